"""The token-sparse oracle: every query gathers its keys, in plain jnp, for every device."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import FP8, GROUP, precision_for

TOKENS_PER_STEP = 16
"""Queries whose gathered keys exist at a time."""


def token_sparse_reference(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    indices: Int[Array, "tokens topk"],
    sm_scale: Float[Array, ""],
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """`token_sparse`, differentiable, in memory for a few queries and their keys.

    An e4m3 cache is multiplied with its scales, and all the rest done, in float32.
    """
    ckv, kpe = (lax.collapse(pool, 0, 2) for pool in (ckv_cache, kpe_cache))
    dtype = jnp.float32 if ckv.dtype == FP8 else ckv.dtype
    slots, precision = ckv.shape[0], precision_for(dtype)
    by_slot = None
    if kv_scales is not None and kv_scales.ndim > 0:
        by_slot = lax.collapse(kv_scales, 0, 2)

    def load(pool: Array, at: Array, valid: Array) -> Array:
        rows = pool[at].astype(dtype)
        if pool.dtype == FP8 and by_slot is not None:
            rows *= jnp.repeat(by_slot[at], GROUP, axis=-1)[:, : rows.shape[1]]
        elif pool.dtype == FP8 and kv_scales is not None:
            rows *= kv_scales
        # A select, not a product: unused slots may hold NaN.
        return jnp.where(valid[:, None], rows, jnp.zeros((), dtype))

    def dot(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def attend(query: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_nope, q_pe, ids = query
        valid = (ids >= 0) & (ids < slots)
        at = jnp.clip(ids, 0, slots - 1)
        keys, rope = load(ckv, at, valid), load(kpe, at, valid)
        scores = dot("hc,kc->hk", q_nope.astype(dtype), keys)
        scores += dot("hr,kr->hk", q_pe.astype(dtype), rope)
        scores = jnp.where(valid, scores * (sm_scale * jnp.log2(jnp.e)), -jnp.inf)
        top = scores.max(axis=-1)
        probs = jnp.exp2(scores - jnp.where(jnp.isneginf(top), 0.0, top)[:, None])
        total = probs.sum(axis=-1)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = dot("hk,kc->hc", probs.astype(dtype), keys) / total[:, None]
        return out.astype(q_nope.dtype), jnp.log2(total) + top

    return lax.map(attend, (q_nope, q_pe, indices), batch_size=TOKENS_PER_STEP)
