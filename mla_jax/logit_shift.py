"""What a quantised cache does to a model's logits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from mla_jax.cache import PagedLatentCache
from mla_jax.generate import KV_DTYPES, PREFILL_CHUNK
from mla_jax.nn import Decoder, decode_step, prefill


def logit_shift(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    kv_dtype: str = "fp8",
    backend: str | None = None,
    page_size: int = 64,
) -> dict[str, float]:
    """How far a cache of `kv_dtype` moves the logits that follow each prompt.

    Each prompt's last token attends by a decode step over the cache of all before it, once in
    the model's dtype and once in `kv_dtype`. Returns the absolute difference over all prompts and
    the vocabulary: "median", "p99", "max"; beside them "spread", the standard deviation of the
    plain logits, and "same_token", the share of prompts whose likeliest token stays. Errors:
    ValueError for an empty prompt, or a kv_dtype that nobody knows.

    >>> from flax import nnx
    >>> from mla_jax import presets
    >>> model = Decoder(presets["tiny"], rngs=nnx.Rngs(0))
    >>> sorted(logit_shift(model, [[1, 2, 3], [4]]))
    ['max', 'median', 'p99', 'same_token', 'spread']
    """
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: got {kv_dtype!r}, expected 'fp8'")
    if not prompts or not all(prompts):
        raise ValueError("prompts: got an empty one, expected at least one token in each")
    plain, moved = (
        np.asarray(_next_logits(model, prompts, KV_DTYPES[kind], backend, page_size), np.float64)
        for kind in (None, kv_dtype)
    )
    difference = np.abs(plain - moved)
    return {
        "median": float(np.median(difference)),
        "p99": float(np.quantile(difference, 0.99)),
        "max": float(difference.max()),
        "spread": float(plain.std()),
        "same_token": float((plain.argmax(-1) == moved.argmax(-1)).mean()),
    }


def _next_logits(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    dtype: DTypeLike | None,
    backend: str | None,
    page_size: int,
) -> Float[Array, "prompts vocab"]:
    """The logits after each prompt, its last token by a decode step."""
    batch, longest = len(prompts), max(map(len, prompts))
    max_pages = -(-longest // page_size)
    cache = PagedLatentCache.create(
        model.config,
        num_pages=batch * max_pages,
        page_size=page_size,
        max_batch=batch,
        max_pages=max_pages,
        dtype=dtype,
    )
    table = jnp.arange(batch * max_pages, dtype=jnp.int32).reshape(batch, max_pages)
    cache = cache.with_rows(table, cache.lengths)
    run, step = (
        jax.jit(function, static_argnames="backend", donate_argnames="cache")
        for function in (prefill, decode_step)
    )
    width = min(PREFILL_CHUNK, max(longest - 1, 1))
    for begin in range(0, longest - 1, width):
        parts = [prompt[:-1][begin : begin + width] for prompt in prompts]
        tokens = np.zeros((batch, width), np.int32)
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = part
        counts = np.asarray([len(part) for part in parts], np.int32)
        _, cache = run(model, tokens, cache=cache, counts=counts, backend=backend)
    last = np.asarray([prompt[-1] for prompt in prompts], np.int32)
    logits, _ = step(model, last, cache=cache, backend=backend)
    return logits
