"""Token-sparse attention on the Triton kernel: decode over pages of one token.

A query's indices are its page table. The kernel loads them a step ahead and gathers a tile of rows
by them, as it does of any pages of one token; only the ids that stand for no key are new.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import batchable
from pallas_kernels.paged_decode.triton import paged_decode_triton


def _attend(*args: Array, **static: object) -> tuple[Array, Array]:
    """`paged_decode_triton`, told where the first id stands that is none."""
    _, _, pool, _, page_ids, start, *_ = args
    ids = page_ids.reshape(start.shape[0], -1)
    outside = (ids < 0) | (ids >= pool.shape[0])
    position = jnp.arange(ids.shape[1], dtype=jnp.int32)
    named = jnp.min(jnp.where(outside, position, ids.shape[1]), axis=1)
    return paged_decode_triton(*args, named=named, **static)


_batchable = batchable("token_sparse", _attend, sparse=True)


def token_sparse_triton(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    indices: Int[Array, "tokens topk"],
    sm_scale: Float[Array, ""],
    *,
    num_splits: int | None,
    deterministic: bool,
    interpret: bool,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """`token_sparse` on the Triton lowering; indices behind a query's last key cost nothing."""
    tokens, topk = indices.shape

    def by_token(pool: Array) -> Array:
        return lax.collapse(pool, 0, 2)[:, None]

    if kv_scales is not None and kv_scales.ndim > 0:
        kv_scales = by_token(kv_scales)
    inside = (indices >= 0) & (indices < ckv_cache.shape[0] * ckv_cache.shape[1])
    past = jnp.arange(1, topk + 1, dtype=jnp.int32)
    out, lse = _batchable(
        *(q_nope[:, None], q_pe[:, None], by_token(ckv_cache), by_token(kpe_cache)),
        indices.reshape(-1),
        jnp.arange(tokens, dtype=jnp.int32) * topk,
        jnp.max(jnp.where(inside, past, 0), axis=1),
        sm_scale,
        num_splits=num_splits,
        deterministic=deterministic,
        interpret=interpret,
        kv_scales=kv_scales,
    )
    return out[:, 0], lse[:, 0]
