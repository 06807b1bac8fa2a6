"""What the references in plain jnp share: gathered blocks, masks, a masked softmax."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_attention.blocks import compute_dtype


def gather_blocks(
    cache: Float[Array, "batch kv_heads blocks block width"],
    block_table: Int[Array, "batch blocks"],
) -> Float[Array, "batch kv_heads tokens width"]:
    """A request's blocks in their logical order, ids clamped; e4m3 as bfloat16."""
    block_table = jnp.clip(block_table, 0, cache.shape[2] - 1)
    blocks = jnp.take_along_axis(cache, block_table[:, None, :, None, None], axis=2)
    return lax.collapse(blocks, 2, 4).astype(compute_dtype(cache.dtype))


def masked_softmax(
    scores: Float[Array, "*rows keys"], visible: Bool[Array, "*rows keys"]
) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows"]]:
    """(weights, base-2 lse) of base-2 scores; 0 and -inf for a row that sees nothing."""
    scores = jnp.where(visible, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp2(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    lse = jnp.log2(total) + top
    return weights / jnp.where(total == 0, 1.0, total), lse[..., 0]


def with_mask(
    scores: Float[Array, "*rows keys"],
    visible: Bool[Array, "*_ keys"],
    mask: Bool[Array, "*_ keys"] | Float[Array, "*_ keys"] | None,
) -> tuple[Float[Array, "*rows keys"], Bool[Array, "*_ keys"]]:
    """Base-2 scores and what is visible under a mask too: bool keeps, a float is added."""
    if mask is None:
        return scores, visible
    if mask.dtype == jnp.bool_:
        return scores, visible & mask
    return scores + mask.astype(jnp.float32) * jnp.log2(jnp.e), visible
