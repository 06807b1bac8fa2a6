"""The one entry of token-sparse attention: a list of cached tokens for every query."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.checks import check_paged
from pallas_kernels.paged_attention import PagedProblem, unsupported
from pallas_kernels.paged_decode import mosaic_gpu
from pallas_kernels.paged_decode.triton import paged_decode_triton
from pallas_kernels.token_sparse.by_token import by_token
from pallas_kernels.token_sparse.reference import token_sparse_reference

TOPK_MULTIPLE, MOST_TOPK = 64, 2048


def _unsupported_mosaic(problem: PagedProblem) -> str | None:
    if problem.rope == 0:
        return "there are no rope columns, with which the kernel is told of keys that are none"
    # Rows are gathered one by one, whatever the pages.
    return mosaic_gpu.unsupported(dataclasses.replace(problem, page_size=mosaic_gpu.KEYS))


# Fastest first.
BACKENDS = (
    Backend(
        name="mosaic_gpu",
        run=by_token(mosaic_gpu.paged_decode_mosaic),
        unsupported=_unsupported_mosaic,
        unfit=mosaic_gpu.unfit,
        outrun=mosaic_gpu.outrun,
    ),
    Backend(
        name="triton",
        run=by_token(paged_decode_triton),
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, num_splits, deterministic, interpret, **rest: token_sparse_reference(
            *args, **rest
        ),
    ),
)


def _check_indices(indices: Array, tokens: int) -> None:
    if indices.ndim != 2 or indices.shape[0] != tokens:
        raise ValueError(
            f"indices: got shape {indices.shape}, expected [{tokens}, topk], a row a query"
        )
    topk = indices.shape[1]
    if topk % TOPK_MULTIPLE or not 0 < topk <= MOST_TOPK:
        raise ValueError(
            f"indices: got {topk} a query, expected a multiple of {TOPK_MULTIPLE} up to "
            f"{MOST_TOPK}; pad with -1"
        )
    if indices.dtype != jnp.int32:
        raise TypeError(f"indices: got dtype {indices.dtype}, expected int32")


def token_sparse(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    indices: Int[Array, "tokens topk"],
    *,
    sm_scale: float | Float[Array, ""],
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """Attention of every query over the cached tokens that its row of `indices` names.

    An index is page * page_size + offset, in any order; one outside the pool, such as -1, stands
    for no key, anywhere in a row. An index that comes twice counts twice. Nothing is causal. topk
    is a multiple of 64 up to 2048; scores, kv_scales, num_splits, deterministic, interpret and
    errors as in `paged_decode`.
    Returns out, of q's shape and dtype, and the base-2 log-sum-exp [tokens, heads] float32; a query
    without keys gives 0 and -inf.

    >>> q, pool = jnp.ones((3, 2, 16)), jnp.ones((4, 8, 16))
    >>> indices = jnp.full((3, 64), -1).at[:2, 5].set(31)
    >>> out, lse = token_sparse(q, q, pool, pool, indices, sm_scale=1.0)
    >>> out.shape, out[:, 0, 0].tolist()
    ((3, 2, 16), [1.0, 1.0, 0.0])
    """
    tokens = q_nope.shape[0]
    _check_indices(indices, tokens)
    ids = indices.reshape(-1)
    check_paged(
        *(q_nope, q_pe, ckv_cache, kpe_cache, ids),
        {"indices": indices[:, 0]},
        axes="tokens",
        kv_scales=kv_scales,
    )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: got {num_splits}, expected None or at least 1")
    problem = PagedProblem.of("token_sparse", q_nope, q_pe, ckv_cache, ids, tokens, kv_scales)
    chosen = choose("token_sparse", BACKENDS, problem, backend)
    return chosen.run(
        *(q_nope, q_pe, ckv_cache, kpe_cache, indices),
        jnp.asarray(sm_scale, jnp.float32),
        num_splits=num_splits,
        deterministic=deterministic,
        interpret=interpret,
        kv_scales=kv_scales,
    )
