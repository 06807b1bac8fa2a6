"""Paged latent attention in plain jnp, a block of keys at a time, with a running softmax."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.precision import FP8, GROUP, precision_for

KEYS_PER_STEP = 256


def attend_pages_reference(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    first: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    out_dtype: DTypeLike | None = None,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """Query i of request b sits at position first[b] + i and sees the keys up to it.

    out_dtype: None is q's. Memory follows the step, not the longest request; time follows the
    longest request. An e4m3 cache is multiplied with its scales, and all the rest done, in float32.
    """
    out_dtype = out_dtype or q_nope.dtype
    batch, tokens, heads, latent = q_nope.shape
    num_pages, page_size, _ = ckv_cache.shape
    dtype = jnp.float32 if ckv_cache.dtype == FP8 else ckv_cache.dtype
    q_nope, q_pe = q_nope.astype(dtype), q_pe.astype(dtype)
    pages_per_step = max(1, KEYS_PER_STEP // page_size)
    keys_per_step = pages_per_step * page_size
    precision = precision_for(dtype)
    limit = jnp.minimum(first[:, None] + jnp.arange(tokens) + 1, length[:, None])  # [B, S]

    def rows_of(cache: Array, pages: Array) -> Array:
        return cache[pages].reshape(batch, keys_per_step, cache.shape[-1])

    def load(cache: Array, pages: Array, valid: Array) -> Array:
        rows = rows_of(cache, pages).astype(dtype)
        if cache.dtype == FP8 and kv_scales is not None:
            scales = kv_scales
            if scales.ndim:
                scales = jnp.repeat(rows_of(scales, pages), GROUP, axis=-1)[..., : rows.shape[-1]]
            rows *= scales
        # A select, not a product: unused slots may hold NaN.
        return jnp.where(valid[..., None], rows, jnp.zeros((), dtype))

    def dot(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, top, total = state
        position = i * keys_per_step + jnp.arange(keys_per_step)
        valid = position < length[:, None]  # [B, K]
        slots = start[:, None] + i * pages_per_step + jnp.arange(pages_per_step)
        pages = page_ids[jnp.clip(slots, 0, page_ids.shape[0] - 1)]
        pages = jnp.clip(pages, 0, num_pages - 1)
        keys, rope = load(ckv_cache, pages, valid), load(kpe_cache, pages, valid)

        scores = dot("bshc,bkc->bshk", q_nope, keys) + dot("bshr,bkr->bshk", q_pe, rope)
        visible = position < limit[..., None]  # [B, S, K]
        scores = jnp.where(visible[:, :, None], scores * (sm_scale * jnp.log2(jnp.e)), -jnp.inf)

        new_top = jnp.maximum(top, scores.max(axis=-1))
        shift = jnp.where(jnp.isneginf(new_top), 0.0, new_top)
        probs = jnp.exp2(scores - shift[..., None])
        keep = jnp.exp2(top - shift)
        acc = acc * keep[..., None] + dot("bshk,bkc->bshc", probs.astype(dtype), keys)
        return acc, new_top, total * keep + probs.sum(axis=-1)

    rows = (batch, tokens, heads)
    state = (
        jnp.zeros((*rows, latent), jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    steps = lax.div(length.max() + keys_per_step - 1, jnp.int32(keys_per_step))
    acc, top, total = lax.fori_loop(jnp.int32(0), steps.astype(jnp.int32), step, state)
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(out_dtype), jnp.log2(total) + jnp.where(total == 0, 0.0, top)
