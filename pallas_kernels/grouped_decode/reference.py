"""Grouped decode in plain jnp: gathered blocks and a masked softmax, for every device."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_attention.reference import gather_blocks, masked_softmax, with_mask
from pallas_kernels.precision import precision_for


def grouped_decode_reference(
    q: Float[Array, "batch heads width"],
    k_cache: Float[Array, "batch kv_heads blocks block width"],
    v_cache: Float[Array, "batch kv_heads blocks block width"],
    block_table: Int[Array, "batch blocks"],
    length: Int[Array, " batch"],
    mask: Bool[Array, "batch mask_heads keys"] | Float[Array, "batch mask_heads keys"] | None,
    sm_scale: Float[Array, ""],
) -> tuple[Float[Array, "batch heads width"], Float[Array, "batch heads"]]:
    """`grouped_decode`; memory and time follow the cache's size, not the lengths."""
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads)
    precision = precision_for(q.dtype)
    k, v = gather_blocks(k_cache, block_table), gather_blocks(v_cache, block_table)
    tokens = k.shape[2] if mask is None else min(k.shape[2], mask.shape[2])
    k, v = k[:, :, :tokens], v[:, :, :tokens]
    present = jnp.arange(tokens) < length[:, None]
    # A select, not a product: unused slots may hold NaN.
    k, v = (jnp.where(present[:, None, :, None], x, jnp.zeros((), x.dtype)) for x in (k, v))

    scores = jnp.einsum(
        "bkgd,bktd->bkgt",
        *(q.reshape(*grouped, width).astype(k.dtype), k),
        precision=precision,
        preferred_element_type=jnp.float32,
    ).reshape(batch, heads, tokens)
    if mask is not None:
        mask = mask[..., :tokens]
    scores = scores * (sm_scale * jnp.log2(jnp.e))
    scores, visible = with_mask(scores, present[:, None], mask)
    weights, lse = masked_softmax(scores, visible)
    out = jnp.einsum(
        "bkgt,bktd->bkgd",
        *(weights.reshape(*grouped, tokens).astype(v.dtype), v),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(q.shape).astype(v.dtype), lse
