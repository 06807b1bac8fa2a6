"""The entry of paged prefill attention in the absorbed (latent) form."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose
from pallas_kernels.checks import check_paged
from pallas_kernels.paged_prefill.reference import paged_prefill_reference

BACKENDS = (Backend(name="reference", run=paged_prefill_reference),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillProblem:
    """Everything static about a call."""

    batch: int
    tokens: int
    heads: int
    latent: int
    rope: int
    page_size: int
    dtype: str


def paged_prefill(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    first: Int[Array, " batch"],
    *,
    sm_scale: float | Float[Array, ""],
    backend: str | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """Causal attention of new tokens over a paged latent cache that already holds them.

    Request b owns the pages page_ids[start[b]:], of which the first length[b] tokens are valid;
    its query i stands at position first[b] + i and sees the keys at and before it.
    Returns out, of q's dtype, and the base-2 log-sum-exp, float32; a query without keys gives 0
    and -inf. Errors as `paged_decode`.
    """
    check_paged(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length)
    batch, tokens, heads, latent = q_nope.shape
    problem = PrefillProblem(
        batch=batch,
        tokens=tokens,
        heads=heads,
        latent=latent,
        rope=q_pe.shape[-1],
        page_size=ckv_cache.shape[1],
        dtype=str(q_nope.dtype),
    )
    chosen = choose("paged_prefill", BACKENDS, problem, backend)
    return chosen.run(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, first),
        jnp.asarray(sm_scale, jnp.float32),
    )
