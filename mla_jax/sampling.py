"""Choosing the next token on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """temperature, then top_k, then top_p (nucleus, arXiv:1904.09751); temperature 0 is greedy.

    sampler(logits [B, vocab] float32, key) -> tokens [B] int32. Errors: ValueError for a
    temperature below 0, a top_k below 1, a top_p outside (0, 1].

    >>> int(Sampler()(jnp.array([[0.0, 2.0, 1.0]]), jax.random.key(0))[0])
    1
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")

    def __call__(
        self, logits: Float[Array, "batch vocab"], key: Key[Array, ""]
    ) -> Int[Array, " batch"]:
        if self.temperature == 0:
            return logits.argmax(axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            logits = jnp.where(logits < _nucleus_floor(logits, self.top_p), -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _nucleus_floor(logits: Float[Array, "batch vocab"], top_p: float) -> Float[Array, "batch 1"]:
    """The smallest logit of the fewest tokens whose probabilities reach top_p."""
    ranked = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The first token always belongs: nothing comes before it.
    return jnp.where(before < top_p, ranked, jnp.inf).min(axis=-1, keepdims=True)
