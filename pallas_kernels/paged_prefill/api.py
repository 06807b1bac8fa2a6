"""The entry of paged prefill attention in the absorbed (latent) form."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.batching import batchable
from pallas_kernels.checks import check_paged
from pallas_kernels.paged_attention import PagedProblem, unsupported
from pallas_kernels.paged_prefill.reference import paged_prefill_reference
from pallas_kernels.paged_prefill.triton import paged_prefill_triton

# Fastest first.
BACKENDS = (
    Backend(
        name="triton",
        run=batchable("paged_prefill", paged_prefill_triton),
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, deterministic, interpret, **rest: paged_prefill_reference(*args, **rest),
    ),
)


def paged_prefill(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    *,
    sm_scale: float | Float[Array, ""],
    max_count: int | None = None,
    deterministic: bool = False,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """Causal attention of ragged new tokens over a paged latent cache that already holds them.

    Request b's queries stand at q_start[b]:q_start[b] + q_count[b] (q_start ascends from 0, also
    over requests without queries); they are the last q_count[b] of its length[b] positions, in the
    pages page_ids[start[b]:], and each sees the keys at and before its own position. Other rows of
    q are padding. max_count: a bound on q_count, which saves the reference work; None knows none.
    Scores, pages, kv_scales, deterministic, interpret and errors as in `paged_decode`.
    Returns out, of q's shape and dtype, and the base-2 log-sum-exp [tokens, heads] float32; padding
    and queries without keys give 0 and -inf.
    """
    check_paged(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids),
        {"start": start, "length": length, "q_start": q_start, "q_count": q_count},
        axes="tokens",
        kv_scales=kv_scales,
    )
    tokens, batch = q_nope.shape[0], start.shape[0]
    if max_count is not None and max_count < 1:
        raise ValueError(f"max_count: got {max_count}, expected None or at least 1")
    problem = PagedProblem.of("paged_prefill", q_nope, q_pe, ckv_cache, page_ids, batch, kv_scales)
    chosen = choose("paged_prefill", BACKENDS, problem, backend)
    return chosen.run(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, q_start, q_count),
        jnp.asarray(sm_scale, jnp.float32),
        max_count=min(max_count or tokens, tokens),
        deterministic=deterministic,
        interpret=interpret,
        **({} if kv_scales is None else {"kv_scales": kv_scales}),
    )
