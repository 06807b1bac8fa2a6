"""Argument checks that the paged operations share: one line, naming argument, got, expected."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from pallas_kernels.precision import FP8, GROUP

FLOATS = ("float32", "bfloat16", "float16")


def _check_shape(name: str, array: Array, expected: tuple[int, ...], where: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected}, {where}")


def _check_cache_dtypes(
    dtype: DTypeLike, ckv_cache: Array, kpe_cache: Array, kv_scales: Array | None
) -> None:
    """The pools are of q's dtype, or of float8_e4m3fn with scales that fit; see `paged_decode`."""
    fp8 = ckv_cache.dtype == FP8
    if ckv_cache.dtype != dtype and not fp8:
        raise TypeError(
            f"ckv_cache: got dtype {ckv_cache.dtype}, expected {dtype}, q_nope's, or {FP8}"
        )
    by_slot = kv_scales is not None and kv_scales.ndim > 0
    if kpe_cache.dtype != dtype and not (fp8 and kpe_cache.dtype == FP8 and not by_slot):
        also = f", or {FP8} with one scale" if fp8 else ""
        raise TypeError(f"kpe_cache: got dtype {kpe_cache.dtype}, expected {dtype}, q_nope's{also}")
    if kv_scales is None:
        return
    if not fp8:
        raise ValueError(
            f"kv_scales: got an array, expected None for a ckv_cache of {ckv_cache.dtype}"
        )
    *slots, latent = ckv_cache.shape
    if by_slot:
        where = f"one a slot and {GROUP} columns, or () for the whole cache"
        _check_shape("kv_scales", kv_scales, (*slots, -(-latent // GROUP)), where)
    if kv_scales.dtype != jnp.float32:
        raise TypeError(f"kv_scales: got dtype {kv_scales.dtype}, expected float32")


def check_paged(
    q_nope: Array,
    q_pe: Array,
    ckv_cache: Array,
    kpe_cache: Array,
    page_ids: Array,
    per_request: dict[str, Array],
    *,
    axes: str,
    kv_scales: Array | None = None,
) -> None:
    """ValueError for shapes, TypeError for dtypes, of a paged attention call.

    axes: what q's leading axes are, "batch, tokens" or "tokens"; per_request: int32 [batch] each.
    """
    leading = axes.count(",") + 1
    if q_nope.ndim != leading + 2:
        raise ValueError(f"q_nope: got shape {q_nope.shape}, expected [{axes}, heads, latent]")
    if ckv_cache.ndim != 3:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected [pages, page, latent]")
    if q_pe.ndim != leading + 2:
        raise ValueError(f"q_pe: got shape {q_pe.shape}, expected [{axes}, heads, rope]")
    if 0 in q_nope.shape:
        raise ValueError(f"q_nope: got shape {q_nope.shape}, expected no empty axis")
    if 0 in ckv_cache.shape:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected no empty axis")
    rope = q_pe.shape[-1]
    _check_shape("q_pe", q_pe, (*q_nope.shape[:-1], rope), f"[{axes}, heads, rope]")
    if ckv_cache.shape[-1] != q_nope.shape[-1]:
        raise ValueError(
            f"ckv_cache: got shape {ckv_cache.shape}, expected a last axis of "
            f"{q_nope.shape[-1]}, q_nope's latent"
        )
    pages = (*ckv_cache.shape[:2], rope)
    _check_shape("kpe_cache", kpe_cache, pages, "ckv_cache's pages and q_pe's rope")
    batch = q_nope.shape[0] if leading == 2 else next(iter(per_request.values())).shape[0]
    if batch == 0:
        raise ValueError("start: got no request, expected at least one")
    for name, array in per_request.items():
        _check_shape(name, array, (batch,), "one a request")
    if page_ids.ndim != 1 or page_ids.shape[0] == 0:
        raise ValueError(f"page_ids: got shape {page_ids.shape}, expected a non-empty vector")
    dtype = q_nope.dtype
    if str(dtype) not in FLOATS:
        raise TypeError(f"q_nope: got dtype {dtype}, expected one of {', '.join(FLOATS)}")
    if q_pe.dtype != dtype:
        raise TypeError(f"q_pe: got dtype {q_pe.dtype}, expected {dtype}, q_nope's")
    _check_cache_dtypes(dtype, ckv_cache, kpe_cache, kv_scales)
    for name, array in {"page_ids": page_ids, **per_request}.items():
        if array.dtype != jnp.int32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
