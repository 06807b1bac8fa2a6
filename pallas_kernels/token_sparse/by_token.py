"""Token-sparse attention on the kernels of paged decode: over pages of one token.

A query's indices are its page table. A kernel loads them a step ahead and gathers a tile of rows by
them; only the ids that stand for no key are new.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.batching import Results, batchable


def by_token(decode: Callable[..., Results]) -> Callable[..., Results]:
    """`token_sparse` by paged decode; indices behind a query's last key cost nothing.

    decode(.., named=n) has pages of one token, of whose first n [batch] ids all are of the pool.
    """

    def attend(*args: Array, **static: object) -> Results:
        _, _, pool, _, page_ids, start, *_ = args
        ids = page_ids.reshape(start.shape[0], -1)
        outside = (ids < 0) | (ids >= pool.shape[0])
        position = jnp.arange(ids.shape[1], dtype=jnp.int32)
        named = jnp.min(jnp.where(outside, position, ids.shape[1]), axis=1)
        return decode(*args, named=named, **static)

    batched = batchable("token_sparse", attend, sparse=True)

    def run(
        q_nope: Float[Array, "tokens heads latent"],
        q_pe: Float[Array, "tokens heads rope"],
        ckv_cache: Float[Array, "pages page latent"],
        kpe_cache: Float[Array, "pages page rope"],
        indices: Int[Array, "tokens topk"],
        sm_scale: Float[Array, ""],
        *,
        kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
        **static: object,
    ) -> Results:
        tokens, topk = indices.shape

        def flat(pool: Array) -> Array:
            return lax.collapse(pool, 0, 2)[:, None]

        if kv_scales is not None and kv_scales.ndim > 0:
            kv_scales = flat(kv_scales)
        inside = (indices >= 0) & (indices < ckv_cache.shape[0] * ckv_cache.shape[1])
        past = jnp.arange(1, topk + 1, dtype=jnp.int32)
        out, lse = batched(
            *(q_nope[:, None], q_pe[:, None], flat(ckv_cache), flat(kpe_cache)),
            indices.reshape(-1),
            jnp.arange(tokens, dtype=jnp.int32) * topk,
            jnp.max(jnp.where(inside, past, 0), axis=1),
            sm_scale,
            kv_scales=kv_scales,
            **static,
        )
        return out[:, 0], lse[:, 0]

    return run
