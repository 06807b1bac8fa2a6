"""Cases and float64 oracles of attention with grouped heads, paged in blocks of each request's own.

Loops, written from FlashMLA's contract.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from oracles import GARBAGE, float64, softmax_sum

BLOCK = 64
FP8 = "float8_e4m3fn"
BOUNDS = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 2e-2, 1.0: 5e-2},
    "float16": {0.99: 2e-3, 1.0: 6e-3},
    FP8: {0.99: 2e-2, 1.0: 5e-2},
}
LSE = {"float32": {1.0: 1e-4}, "bfloat16": {1.0: 1e-3}, "float16": {1.0: 1e-3}, FP8: {1.0: 1e-3}}


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def out_dtype(dtype: str) -> str:
    return "bfloat16" if dtype == FP8 else dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedCase:
    """Caches that are NaN wherever no token lies, under tables with garbage behind the used ids."""

    q: jax.Array  # [B, Hq, S, D]
    k_cache: jax.Array
    v_cache: jax.Array
    block_table: jax.Array
    length: jax.Array

    @property
    def args(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Those of a decode call of S = 1."""
        return (self.q[:, :, 0], self.k_cache, self.v_cache, self.block_table, self.length)

    def keys(self, b: int, head: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens' keys and values, of the key head of query head `head`."""
        key_head = head // (self.q.shape[1] // self.k_cache.shape[1])
        token = np.arange(count)
        block = np.asarray(self.block_table)[b, token // BLOCK]
        index = b, key_head, block, token % BLOCK
        return float64(self.k_cache)[index], float64(self.v_cache)[index]


def make_grouped(
    rng: np.random.Generator,
    lengths: tuple[int, ...],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    blocks: int = 3,
    queries: int = 1,
    dtype: str = "float32",
    garbage: bool = True,
) -> GroupedCase:
    """Requests of `lengths` tokens in `blocks` blocks each, in random order."""
    batch, (q_heads, kv_heads) = len(lengths), heads
    caches = [np.full((batch, kv_heads, blocks, BLOCK, width), np.nan) for _ in range(2)]
    table = np.zeros((batch, blocks), np.int64)
    for b, length in enumerate(lengths):
        used = -(-length // BLOCK)
        table[b] = rng.permutation(blocks)
        for j in range(used):
            count = min(length - j * BLOCK, BLOCK)
            for cache in caches:
                cache[b, :, table[b, j], :count] = rng.standard_normal((kv_heads, count, width))
        if garbage:
            table[b, used:] = rng.choice(GARBAGE, blocks - used)
    k_cache, v_cache = (jnp.asarray(cache, jnp.float32).astype(dtype) for cache in caches)
    return GroupedCase(
        q=drawn(rng, (batch, q_heads, queries, width), dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=jnp.asarray(table, jnp.int32),
        length=jnp.asarray(lengths, jnp.int32),
    )


def some_mask(
    rng: np.random.Generator, kind: str | None, shape: tuple[int, ...]
) -> jax.Array | None:
    """A mask of a kind: bool, or floats some of which are -inf; None of kind None."""
    if kind is None:
        return None
    kept = rng.random(shape) < 0.7
    if kind == "bool":
        return jnp.asarray(kept)
    return jnp.asarray(np.where(kept, rng.standard_normal(shape), -np.inf), kind)


def masked_scores(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Scores of keys under a row of a mask of the same keys, or more."""
    if mask is None:
        return scores
    mask = mask[: len(scores)]
    return np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + float64(mask)


def decode_attention(
    case: GroupedCase, mask: jax.Array | None, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse) of one query a request; mask [B, 1 or Hq, keys]."""
    batch, heads, _, width = case.q.shape
    out, lse = np.zeros((batch, heads, width)), np.full((batch, heads), -np.inf)
    for b, h in np.ndindex(batch, heads):
        k, v = case.keys(b, h, int(case.length[b]))
        row = None if mask is None else np.asarray(mask)[b, h % mask.shape[1]]
        scores = masked_scores(k @ float64(case.q)[b, h, 0] * scale, row)
        if (scores > -np.inf).any():
            out[b, h], lse[b, h] = softmax_sum(scores, v)
    return out, lse


def prefill_attention(
    q: jax.Array,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    *,
    layout: jax.Array | None = None,
    mask: jax.Array | None = None,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse), a row at a time, keys that the layout skips never looked at."""
    batch, heads, tokens, width = q.shape
    out, lse = np.zeros((batch, heads, tokens, width)), np.full((batch, heads, tokens), -np.inf)
    group = heads // k.shape[1]
    for b, h, i in np.ndindex(batch, heads, tokens):
        allowed = np.arange(tokens) <= (i if causal else tokens)
        if layout is not None:
            blocks = np.asarray(layout)
            if blocks.ndim > 2:
                blocks = blocks[b]
            if blocks.ndim > 2:
                blocks = blocks[h % len(blocks)]
            allowed &= np.repeat(blocks[i // BLOCK], BLOCK)[:tokens]
        keys = np.flatnonzero(allowed)
        row = None if mask is None else np.asarray(mask)[b, h % mask.shape[1], i][keys]
        scores = masked_scores(k[b, h // group, keys] @ float64(q)[b, h, i] * scale, row)
        if (scores > -np.inf).any():
            out[b, h, i], lse[b, h, i] = softmax_sum(scores, v[b, h // group, keys])
    return out, lse
