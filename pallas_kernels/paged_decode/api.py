"""The one entry of paged decode attention: flat page ids, a start and a length a request."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.batching import batchable
from pallas_kernels.checks import check_paged
from pallas_kernels.paged_attention import PagedProblem, unsupported
from pallas_kernels.paged_decode import mosaic_gpu
from pallas_kernels.paged_decode.reference import paged_decode_reference
from pallas_kernels.paged_decode.triton import paged_decode_triton

MAX_QUERY_TOKENS = 8

# Fastest first.
BACKENDS = (
    Backend(
        name="mosaic_gpu",
        run=batchable("paged_decode", mosaic_gpu.paged_decode_mosaic),
        unsupported=mosaic_gpu.unsupported,
        unfit=mosaic_gpu.unfit,
        outrun=mosaic_gpu.outrun,
    ),
    Backend(
        name="triton",
        run=batchable("paged_decode", paged_decode_triton),
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, num_splits, deterministic, interpret, **rest: paged_decode_reference(
            *args, **rest
        ),
    ),
)


def paged_decode(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    *,
    sm_scale: float | Float[Array, ""],
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """Attention of each request's last 1-8 tokens over its paged latent cache.

    Request b owns the pages page_ids[start[b]:] and length[b] tokens in them; its query token i is
    the position length[b] - tokens + i and sees the keys at and before it. Scores are
    (q_nope ckv^T + q_pe kpe^T) * sm_scale in float32, the value is the latent itself. Ids may come
    in any order and be shared; ids beyond a request's last page and slots beyond its length are
    never used, whatever they hold; ids out of range are clamped. Two requests' stretches of
    page_ids must not overlap. A block table [B, max_pages] is
    page_ids = table.ravel(), start = arange(B) * max_pages.

    The pools are of q's dtype, or ckv_cache is float8_e4m3fn: its numbers are multiplied with
    kv_scales, float32, [pages, page, ceil(latent / 128)] for each slot and 128 columns, or one
    number []; None is 1. With one, kpe_cache may be e4m3 under it too.
    num_splits: blocks that share one request's keys; None follows the lengths and the device's
    cores. deterministic: a request's result is the same to the bit whatever else is in the batch.
    interpret: with a Pallas backend named, run the kernel's Python on any device.
    Returns out [batch, tokens, heads, latent] of q's dtype and the base-2 log-sum-exp
    [batch, tokens, heads] float32; a query without keys gives 0 and -inf.
    Errors: ValueError (shape), TypeError (dtype), NotImplementedError (backend, with the reason).
    """
    check_paged(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids),
        {"start": start, "length": length},
        axes="batch, tokens",
        kv_scales=kv_scales,
    )
    tokens = q_nope.shape[1]
    if not 1 <= tokens <= MAX_QUERY_TOKENS:
        raise ValueError(f"q_nope: got {tokens} query tokens, expected 1 to {MAX_QUERY_TOKENS}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: got {num_splits}, expected None or at least 1")
    problem = PagedProblem.of(
        "paged_decode", q_nope, q_pe, ckv_cache, page_ids, q_nope.shape[0], kv_scales
    )
    chosen = choose("paged_decode", BACKENDS, problem, backend)
    return chosen.run(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length),
        jnp.asarray(sm_scale, jnp.float32),
        num_splits=num_splits,
        deterministic=deterministic,
        interpret=interpret,
        **({} if kv_scales is None else {"kv_scales": kv_scales}),
    )
