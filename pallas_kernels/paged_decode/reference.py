"""The decode oracle: paged latent attention in plain jnp, for every device."""

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import attend_pages_reference


def paged_decode_reference(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """Decode is prefill whose queries are the last `tokens` positions of every request."""
    first = length - q_nope.shape[1]
    return attend_pages_reference(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, first, sm_scale),
        kv_scales=kv_scales,
    )
