"""The prefill oracle: every request padded to the same number of queries, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import attend_pages_reference


def paged_prefill_reference(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    *,
    max_count: int,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """`paged_prefill`, in memory and time for max_count queries of every request."""
    tokens = q_nope.shape[0]
    index = jnp.arange(max_count)
    rows = jnp.where(index < q_count[:, None], q_start[:, None] + index, tokens)  # [B, S]

    def padded(q: Array) -> Array:
        return q.at[rows].get(mode="fill", fill_value=0)

    out, lse = attend_pages_reference(
        *(padded(q_nope), padded(q_pe), ckv_cache, kpe_cache),
        *(page_ids, start, length, length - q_count, sm_scale),
        kv_scales=kv_scales,
    )
    return (
        jnp.zeros_like(q_nope).at[rows].set(out, mode="drop"),
        jnp.full(q_nope.shape[:2], -jnp.inf, jnp.float32).at[rows].set(lse, mode="drop"),
    )
