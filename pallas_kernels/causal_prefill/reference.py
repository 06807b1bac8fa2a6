"""Causal prefill in plain jnp: a masked softmax over all keys, a block of queries at a time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision_for

# Scores of one block of queries: 64 MiB in float32.
SCORES_PER_STEP = 1 << 24


def _belongs(
    rows: Array, start: Int[Array, " batch"], count: Int[Array, " batch"]
) -> Int[Array, "rows batch"]:
    """Which of `rows` lies in the range of which request."""
    return (rows[:, None] >= start) & (rows[:, None] < start + count)


def causal_prefill_reference(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "keys heads width"],
    v: Float[Array, "keys heads value_width"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    kv_start: Int[Array, " batch"],
    kv_count: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    *,
    causal: bool,
) -> tuple[Float[Array, "tokens heads value_width"], Float[Array, "tokens heads"]]:
    """`causal_prefill`, differentiable.

    Memory: a few times SCORES_PER_STEP floats, or heads * keys if that is more, in the gradient
    too, which computes the scores again. Time: tokens * keys, whatever the requests' lengths.
    """
    tokens, heads, width = q.shape
    keys = k.shape[0]
    precision = precision_for(q.dtype)
    scale = lax.stop_gradient(sm_scale) * jnp.log2(jnp.e).astype(jnp.float32)
    rows = max(1, min(tokens, SCORES_PER_STEP // (heads * keys)))
    key = jnp.arange(keys, dtype=jnp.int32)

    def select(mask: Array, x: Array) -> Array:
        # A select, not a product: unused rows may hold NaN, in the gradient too.
        return jnp.where(mask[:, None, None], x, jnp.zeros((), x.dtype))

    used = _belongs(key, kv_start, kv_count).any(axis=1)
    k, v = select(used, k), select(used, v)

    @jax.checkpoint
    def attend(block: tuple[Array, Array]) -> tuple[Array, Array]:
        q, row = block
        belongs = _belongs(row, q_start, q_count)
        request = belongs.argmax(axis=1)
        is_query = belongs.any(axis=1)
        position = key - kv_start[request][:, None]
        count = kv_count[request]
        last = count - 1
        if causal:
            last = last - q_count[request] + 1 + row - q_start[request]
        visible = (position >= 0) & (position <= last[:, None]) & is_query[:, None]

        scores = jnp.einsum(
            "thd,khd->thk",
            *(select(is_query, q), k),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(visible[:, None], scores * scale, -jnp.inf)
        top = lax.stop_gradient(scores.max(axis=-1))
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        probs = jnp.exp2(scores - top[..., None])
        total = probs.sum(axis=-1)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = jnp.einsum(
            "thk,khv->thv",
            *(probs.astype(v.dtype), v),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        lse = jnp.where(empty, -jnp.inf, top + jnp.log2(total))
        return (out / total[..., None]).astype(q.dtype), lse

    blocks = -(-tokens // rows)
    q = jnp.pad(q, ((0, blocks * rows - tokens), (0, 0), (0, 0)))
    row = jnp.arange(blocks * rows, dtype=jnp.int32)
    # The rows of padding lie in no request.
    row = jnp.where(row < tokens, row, -1)
    out, lse = lax.map(attend, (q.reshape(blocks, rows, heads, width), row.reshape(blocks, rows)))
    return (
        out.reshape(blocks * rows, heads, v.shape[2])[:tokens],
        lse.reshape(blocks * rows, heads)[:tokens],
    )
