"""Sparse prefill in plain jnp: a masked softmax over all keys, a block of queries at a time."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_attention.blocks import BLOCK, compute_dtype
from pallas_kernels.grouped_attention.reference import gather_blocks, masked_softmax, with_mask
from pallas_kernels.precision import precision_for

# Scores of one block of queries: 64 MiB in float32.
SCORES_PER_STEP = 1 << 24


def sparse_prefill_reference(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads *tokens width"],
    v: Float[Array, "batch kv_heads *tokens width"],
    layout: Bool[Array, "layout_batch layout_heads blocks blocks"] | None,
    mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None,
    block_table: Int[Array, "batch blocks"] | None,
    sm_scale: Float[Array, ""],
    *,
    causal: bool,
) -> tuple[Float[Array, "batch heads tokens width"], Float[Array, "batch heads tokens"]]:
    """`sparse_prefill`; time is tokens squared, whatever the layout skips."""
    batch, heads, tokens, width = q.shape
    kv_heads = k.shape[1]
    dtype = compute_dtype(q.dtype)
    precision = precision_for(q.dtype)
    if block_table is not None:
        k, v = gather_blocks(k, block_table), gather_blocks(v, block_table)
    # Slots behind the tokens may hold NaN.
    k, v = k[:, :, :tokens].astype(dtype), v[:, :, :tokens].astype(dtype)
    key = jnp.arange(tokens, dtype=jnp.int32)

    def attend(row: Array) -> tuple[Array, Array]:
        rows = row.shape[0]
        grouped = (batch, kv_heads, heads // kv_heads, rows)
        scores = jnp.einsum(
            "bkgqd,bktd->bkgqt",
            *(q[:, :, row].reshape(*grouped, width).astype(dtype), k),
            precision=precision,
            preferred_element_type=jnp.float32,
        ).reshape(batch, heads, rows, tokens)
        scores = scores * (sm_scale * jnp.log2(jnp.e))
        visible = key <= row[:, None] if causal else jnp.ones((rows, tokens), jnp.bool_)
        if layout is not None:
            visible = visible & layout[..., row // BLOCK, :][..., key // BLOCK]
        here = None if mask is None else mask[:, :, row][..., :tokens]
        scores, visible = with_mask(scores, visible, here)
        weights, lse = masked_softmax(scores, visible)
        out = jnp.einsum(
            "bkgqt,bktd->bkgqd",
            *(weights.reshape(*grouped, tokens).astype(dtype), v),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return out.reshape(batch, heads, rows, width).astype(dtype), lse

    rows = max(1, min(tokens, SCORES_PER_STEP // (batch * heads * tokens)))
    steps = -(-tokens // rows)
    row = jnp.minimum(jnp.arange(steps * rows, dtype=jnp.int32), tokens - 1)
    out, lse = lax.map(attend, row.reshape(steps, rows))
    out, lse = jnp.moveaxis(out, 0, 2), jnp.moveaxis(lse, 0, 2)
    return (
        lax.collapse(out, 2, 4)[:, :, :tokens],
        lax.collapse(lse, 2, 4)[:, :, :tokens],
    )
