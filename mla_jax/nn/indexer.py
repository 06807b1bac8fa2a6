"""The lightning indexer's weights, and what it makes of a layer's inputs."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax.cache import PageView, write_pages
from mla_jax.config import MLAConfig
from mla_jax.indexer import (
    IndexVectors,
    hadamard,
    lightning_indexer,
    places,
    quantize_vectors,
    select_keys,
)
from mla_jax.nn.linear import Linear, einsum, plain
from mla_jax.nn.norm import LayerNorm
from mla_jax.quantization import QuantizedPool
from mla_jax.rope import apply_rotary


class Indexer(nnx.Module):
    """Which tokens each token attends to, by small heads of their own (arXiv:2512.02556).

    Queries come from the layer's normalised query latent, the one key a token and the heads'
    weights from its input. The first qk_rope_head_dim columns of queries and keys are rotated, by
    halves, whatever the attention's own are.

    >>> from mla_jax.rope import rotation
    >>> config = MLAConfig(
    ...     dim=32, n_heads=2, q_lora_rank=16, index_n_heads=4, index_topk=64, dtype="float32"
    ... )
    >>> indexer = Indexer(config, rngs=nnx.Rngs(0))
    >>> rope = rotation(config, jnp.arange(5)[None])
    >>> indexer(jnp.ones((1, 5, 32)), jnp.ones((1, 5, 16)), rope).shape
    (1, 5, 64)
    """

    def __init__(self, config: MLAConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, width, dtype = config.index_n_heads, config.index_head_dim, config.dtype
        self.wq_b = Linear(config.q_lora_rank, heads * width, dtype, rngs=rngs)
        self.wk = Linear(config.dim, width, dtype, rngs=rngs)
        self.k_norm = LayerNorm(width, "float32")  # as checkpoints have it
        self.weights_proj = Linear(config.dim, heads, dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        q_lora: Float[Array, "batch tokens rank"],
        rope: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    ) -> Int[Array, "batch tokens topk"]:
        """Among whole sequences: the positions of each token's choice, -1 where there are fewer.

        q_lora: the normalised query latent; rope: (cos, sin) at the tokens' positions.
        """
        return lightning_indexer(*self.project(x, q_lora, rope), topk=self.config.index_topk)

    def visible(
        self,
        x: Float[Array, "batch tokens dim"],
        q_lora: Float[Array, "batch tokens rank"],
        rope: tuple[Float[Array, "*#batch tokens half"], Float[Array, "*#batch tokens half"]],
    ) -> Bool[Array, "batch tokens tokens"]:
        """The choice among whole sequences as a mask: [b, i, j] if token i attends to token j."""
        batch, tokens, _ = x.shape
        chosen = self(x, q_lora, rope)
        # An index of -1 would stand for the last token.
        chosen = jnp.where(chosen < 0, tokens, chosen)
        rows = jnp.arange(batch)[:, None, None], jnp.arange(tokens)[:, None]
        return jnp.zeros((batch, tokens, tokens), bool).at[(*rows, chosen)].set(True, mode="drop")

    def paged(
        self,
        x: Float[Array, "batch tokens dim"],
        q_lora: Float[Array, "batch tokens rank"],
        pool: QuantizedPool,
        view: PageView,
        rope: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    ) -> tuple[Int[Array, "batch tokens topk"] | None, QuantizedPool]:
        """Write the tokens' keys to their pages, then choose among all that each row has cached.

        Returns (indices as `mla_jax.mla_sparse_decode` takes them, pool). None stands for a choice
        of everything: where no row has pages for more than index_topk tokens.
        """
        q, k, weights = self.project(x, q_lora, rope)
        pool = write_pages(pool, view, hadamard(k))
        (batch, tokens, _), (num_pages, page_size, width) = x.shape, pool.shape
        table, topk = view.page_ids.reshape(batch, -1), self.config.index_topk
        if table.shape[1] * page_size <= topk:
            return None, pool
        ids = jnp.clip(table, 0, num_pages - 1)
        keys = IndexVectors(
            pool.values[ids].reshape(batch, -1, width), pool.scales[ids].reshape(batch, -1)
        )
        # A token that is not written sees nothing: its row may hold anything there.
        new = jnp.arange(tokens, dtype=jnp.int32) < view.counts[:, None]
        positions = jnp.where(new, view.positions, -1)
        chosen = select_keys(quantize_vectors(q), keys, weights, positions, topk)
        return places(chosen, table, page_size), pool

    def project(
        self,
        x: Float[Array, "batch tokens dim"],
        q_lora: Float[Array, "batch tokens rank"],
        rope: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    ) -> tuple[
        Float[Array, "batch tokens heads width"],
        Float[Array, "batch tokens width"],
        Float[Array, "batch tokens heads"],
    ]:
        """(q, k, weights) as `mla_jax.lightning_indexer` takes them; the weights in float32."""
        cos, sin = rope
        q = self.wq_b(q_lora).reshape(*x.shape[:-1], -1, self.config.index_head_dim)
        q = self._rotate(q, cos[..., None, :], sin[..., None, :])
        k = self._rotate(self.k_norm(self.wk(x)), cos, sin)
        to_weights = plain(self.weights_proj.weight[...], x.dtype)
        weights = einsum("...i,hi->...h", x, to_weights, out=jnp.float32)
        return q, k, weights

    def _rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        rotated, rest = jnp.split(x, [self.config.qk_rope_head_dim], axis=-1)
        rotated = apply_rotary(rotated, cos, sin, interleave=False)
        return jnp.concatenate([rotated, rest], axis=-1)
