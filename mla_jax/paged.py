"""Latent attention over pages listed in CSR form, as FlashInfer's `mla_paged` lists them."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_prefill import causal_prefill
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

HEAD = {"width": 192}
ABSORBED = {"latent": 512, "rope": 64}
DEFAULT_SM_SCALE = 192**-0.5
"""DeepSeek's (128 + 64)^-1/2: the width of a head before absorption, not of the latent."""


def scale_or_default(
    sm_scale: float | Float[Array, ""] | None, got: dict[str, int], default_for: dict[str, int]
) -> float | Float[Array, ""]:
    """`sm_scale`, or the default where the widths are DeepSeek's."""
    if sm_scale is not None:
        return sm_scale
    if got != default_for:
        widths = (" and ".join(f"{k} {v}" for k, v in of.items()) for of in (got, default_for))
        raise ValueError(
            "sm_scale: got None for {}, expected a value: the default holds for {}".format(*widths)
        )
    return DEFAULT_SM_SCALE


def is_concrete(*arrays: Array | None) -> bool:
    """Whether there are values to check: under jit and vmap the arrays are traced."""
    return not any(isinstance(array, Tracer) for array in arrays)


def _check_ints(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}, {meaning}")
    if array.dtype != jnp.int32:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")


def _ranges(
    name: str, indptr: Array, batch: int, size: int, unit: str
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """(start, count) of each request's stretch of an array of `size`; a bad indptr is an error."""
    _check_ints(name, indptr, (batch + 1,), "one more than there are requests")
    if is_concrete(indptr):
        values = np.asarray(indptr)
        if values[0] != 0:
            raise ValueError(f"{name}: got {values[0]} as its first value, expected 0")
        drops = np.flatnonzero(np.diff(values) < 0)
        if drops.size:
            before, after = values[drops[0] :][:2]
            raise ValueError(f"{name}: got {after} after {before}, expected no decrease")
        if values[-1] > size:
            raise ValueError(f"{name}: got {values[-1]} at its end, expected at most {size} {unit}")
    # Whatever a traced indptr holds, the stretches are disjoint and inside the array.
    bounds = jnp.clip(lax.cummax(jnp.asarray(indptr)), 0, size)
    return bounds[:-1], jnp.diff(bounds)


def _batch(qo_indptr: Array) -> int:
    """The number of requests, where queries do not tell."""
    if qo_indptr.ndim != 1 or qo_indptr.shape[0] < 2:
        raise ValueError(
            f"qo_indptr: got shape {qo_indptr.shape}, expected one more than there are requests"
        )
    return qo_indptr.shape[0] - 1


def _check_pages(
    kv_indptr: Array, kv_indices: Array, last: Array | None, num_pages: int, page_size: int
) -> None:
    """ValueError for page ids and lengths that are out of range, where there are values to see."""
    if is_concrete(kv_indptr, kv_indices):
        used = np.asarray(kv_indices)[: np.asarray(kv_indptr)[-1]]
        if used.size and not (used.min() >= 0 and used.max() < num_pages):
            raise ValueError(
                f"kv_indices: got ids from {used.min()} to {used.max()}, "
                f"expected 0 to {num_pages - 1}"
            )
    if last is not None and is_concrete(kv_indptr, last):
        lengths = np.asarray(last)[np.diff(np.asarray(kv_indptr)) > 0]
        if lengths.size and not (lengths.min() >= 1 and lengths.max() <= page_size):
            raise ValueError(
                f"kv_last_page_len: got {lengths.min()} to {lengths.max()}, "
                f"expected 1 to {page_size}"
            )


def _requests(
    ckv_cache: Array, kv_indptr: Array, kv_indices: Array, last: Array | None, batch: int
) -> tuple[Int[Array, " ids"], Int[Array, " batch"], Int[Array, " batch"]]:
    """(page_ids, start, length) as the kernels take them, of pages in CSR form."""
    if ckv_cache.ndim != 3:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected [pages, page, latent]")
    if kv_indices.ndim != 1:
        raise ValueError(f"kv_indices: got shape {kv_indices.shape}, expected a vector of page ids")
    ids = kv_indices.shape[0]
    _check_ints("kv_indices", kv_indices, (ids,), "page ids")
    start, pages = _ranges("kv_indptr", kv_indptr, batch, ids, "ids in kv_indices")
    if last is not None:
        _check_ints("kv_last_page_len", last, (batch,), "one a request")
    num_pages, page_size, _ = ckv_cache.shape
    _check_pages(kv_indptr, kv_indices, last, num_pages, page_size)

    length = pages * page_size
    if last is not None:
        last = jnp.clip(last, 0, page_size)
        length = jnp.where(pages > 0, length - page_size + last, 0)
    # Nobody has a page: the kernels want an id to stand there, which none of them uses.
    return (jnp.asarray(kv_indices) if ids else jnp.zeros(1, jnp.int32)), start, length


def mla_paged_decode(
    q_nope: Float[Array, "batch *tokens heads latent"],
    q_pe: Float[Array, "batch *tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    kv_indptr: Int[Array, " batch_plus_1"],
    kv_indices: Int[Array, " ids"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    kv_last_page_len: Int[Array, " batch"] | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch *tokens heads latent"], Float[Array, "batch *tokens heads"]]:
    """Absorbed decode attention over a paged latent cache (FlashInfer's `mla_paged` decode).

    Request b reads the pages kv_indices[kv_indptr[b]:kv_indptr[b+1]] (int32 page ids, any order,
    shared at will), all full but the last, which holds kv_last_page_len[b] tokens (None: full
    too). Scores (q_nope ckv^T + q_pe kpe^T) * sm_scale in float32; the value is the latent.
    q_nope [B, H, C], or [B, S, H, C] for S of 1 to 8 query tokens that are the last positions,
    causal among themselves; a rope width of 0 means none. kv_indices may be longer than
    kv_indptr[-1]; the tail is not read. sm_scale None is 192^-1/2, for latent 512 and rope 64 only.
    The pools are of q's dtype, or float8_e4m3fn with kv_scales, as `quantize_cache` makes them: a
    float32 scale for each slot and 128 columns of the latent [pages, page, ceil(C / 128)], or one
    for both pools []; None is 1.
    num_splits: parts into which a request's keys are cut; None follows lengths and device.
    deterministic: a request's result is the same to the bit whatever else is in the batch.
    interpret: with a Pallas backend named, run the kernel's Python on any device.

    Returns out, of q's shape and dtype, and the base-2 log-sum-exp, float32, without q's last
    axis; a request without keys gives 0 and -inf. Everything but shapes may be traced, and vmap
    makes one launch. Gradients: backend="reference" alone, in reverse mode outside jit only.
    Errors: ValueError (shape, or a value where it is concrete), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).

    >>> q, page = jnp.ones((1, 2, 512)), jnp.ones((3, 16, 512))
    >>> indptr, pages = jnp.array([0, 2]), jnp.array([2, 0])
    >>> out, lse = mla_paged_decode(
    ...     q, jnp.ones((1, 2, 64)), page, jnp.ones((3, 16, 64)), indptr, pages
    ... )
    >>> out.shape, lse.shape
    ((1, 2, 512), (1, 2))
    """
    if q_nope.ndim not in (3, 4) or q_pe.shape[:-1] != q_nope.shape[:-1]:
        raise ValueError(
            f"q_nope, q_pe: got shapes {q_nope.shape} and {q_pe.shape}, expected both "
            "[batch, heads, width] or [batch, tokens, heads, width], alike but for the width"
        )
    widths = {"latent": q_nope.shape[-1], "rope": q_pe.shape[-1]}
    sm_scale = scale_or_default(sm_scale, widths, ABSORBED)
    requests = _requests(ckv_cache, kv_indptr, kv_indices, kv_last_page_len, q_nope.shape[0])
    single = q_nope.ndim == 3
    out, lse = paged_decode(
        q_nope[:, None] if single else q_nope,
        q_pe[:, None] if single else q_pe,
        *(ckv_cache, kpe_cache, *requests),
        sm_scale=sm_scale,
        kv_scales=kv_scales,
        num_splits=num_splits,
        deterministic=deterministic,
        backend=backend,
        interpret=interpret,
    )
    return (out[:, 0], lse[:, 0]) if single else (out, lse)


def mla_paged_prefill(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    qo_indptr: Int[Array, " batch_plus_1"],
    kv_indptr: Int[Array, " batch_plus_1"],
    kv_indices: Int[Array, " ids"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    kv_last_page_len: Int[Array, " batch"] | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """Absorbed causal attention of ragged new tokens over a paged cache that already holds them.

    Request b's n queries are the rows qo_indptr[b]:qo_indptr[b+1] and the last n of its m cached
    positions: query i sees the keys j <= m - n + i. Rows beyond qo_indptr[-1] are padding. Pages,
    kv_scales, scores, sm_scale, deterministic and errors as in `mla_paged_decode`; qo_indptr is
    int32, starts at 0 and never decreases, as kv_indptr does, which counts pages.
    Returns out [tokens, heads, latent] of q's dtype and the base-2 log-sum-exp [tokens, heads]
    float32; padding and queries without keys (m < n, or m = 0) give 0 and -inf. Source:
    FlashInfer's `mla_paged` prefill.

    >>> q, page = jnp.ones((5, 2, 512)), jnp.ones((3, 16, 512))
    >>> out, lse = mla_paged_prefill(
    ...     *(q, jnp.ones((5, 2, 64)), page, jnp.ones((3, 16, 64))),
    ...     *(jnp.array([0, 2, 4]), jnp.array([0, 2, 3]), jnp.array([2, 0, 1])),
    ... )
    >>> out.shape, lse.shape
    ((5, 2, 512), (5, 2))
    """
    for name, q in (("q_nope", q_nope), ("q_pe", q_pe)):
        if q.ndim != 3:
            raise ValueError(f"{name}: got shape {q.shape}, expected [tokens, heads, width]")
    widths = {"latent": q_nope.shape[-1], "rope": q_pe.shape[-1]}
    sm_scale = scale_or_default(sm_scale, widths, ABSORBED)
    batch = _batch(qo_indptr)
    queries = _ranges("qo_indptr", qo_indptr, batch, q_nope.shape[0], "rows of q_nope")
    requests = _requests(ckv_cache, kv_indptr, kv_indices, kv_last_page_len, batch)
    longest = int(np.diff(np.asarray(qo_indptr)).max()) if is_concrete(qo_indptr) else 0
    return paged_prefill(
        *(q_nope, q_pe, ckv_cache, kpe_cache, *requests, *queries),
        sm_scale=sm_scale,
        kv_scales=kv_scales,
        max_count=longest or None,
        deterministic=deterministic,
        backend=backend,
        interpret=interpret,
    )


def mla_ragged_prefill(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "keys heads width"],
    v: Float[Array, "keys heads value_width"],
    qo_indptr: Int[Array, " batch_plus_1"],
    kv_indptr: Int[Array, " batch_plus_1"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads value_width"], Float[Array, "tokens heads"]]:
    """Causal attention in MLA's expanded form over ragged keys and values, without a cache.

    Request b's n queries are the rows qo_indptr[b]:qo_indptr[b+1] of q, its m keys and values the
    rows kv_indptr[b]:kv_indptr[b+1] of k and v (tokens, not pages); query i sees the keys
    j <= m - n + i. Both indptr are int32, start at 0 and never decrease; rows beyond their ends
    are padding. Scores are q k^T * sm_scale in float32; None is 192^-1/2, for width 192 (128 and
    64 of rope) only. Differentiable in q, k and v.
    Returns out [tokens, heads, value_width] of q's dtype and the base-2 log-sum-exp
    [tokens, heads] float32; padding and queries without keys give 0 and -inf.
    Errors: ValueError (shape, or a value where it is concrete), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).

    >>> q, k, v = (jnp.ones((7, 2, width)) for width in (192, 192, 128))
    >>> indptr = jnp.array([0, 3, 7])
    >>> out, lse = mla_ragged_prefill(q, k, v, indptr, indptr)
    >>> out.shape, lse.shape
    ((7, 2, 128), (7, 2))
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3:
            raise ValueError(f"{name}: got shape {array.shape}, expected [tokens, heads, width]")
    sm_scale = scale_or_default(sm_scale, {"width": q.shape[-1]}, HEAD)
    batch = _batch(qo_indptr)
    return causal_prefill(
        *(q, k, v),
        *_ranges("qo_indptr", qo_indptr, batch, q.shape[0], "rows of q"),
        *_ranges("kv_indptr", kv_indptr, batch, k.shape[0], "rows of k"),
        sm_scale=sm_scale,
        backend=backend,
        interpret=interpret,
    )
