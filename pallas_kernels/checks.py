"""Argument checks that the paged operations share: one line, naming argument, got, expected."""

import jax.numpy as jnp
from jaxtyping import Array

FLOATS = ("float32", "bfloat16", "float16")


def _check_shape(name: str, array: Array, expected: tuple[int, ...], where: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected}, {where}")


def check_paged(
    q_nope: Array,
    q_pe: Array,
    ckv_cache: Array,
    kpe_cache: Array,
    page_ids: Array,
    start: Array,
    length: Array,
) -> None:
    """ValueError for shapes, TypeError for dtypes, of a paged attention call."""
    if q_nope.ndim != 4:
        raise ValueError(
            f"q_nope: got shape {q_nope.shape}, expected [batch, tokens, heads, latent]"
        )
    if ckv_cache.ndim != 3:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected [pages, page, latent]")
    if q_pe.ndim != 4:
        raise ValueError(f"q_pe: got shape {q_pe.shape}, expected [batch, tokens, heads, rope]")
    if q_nope.shape[0] == 0:
        raise ValueError("q_nope: got no request, expected at least one")
    if 0 in ckv_cache.shape:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected no empty axis")
    rope = q_pe.shape[-1]
    _check_shape("q_pe", q_pe, (*q_nope.shape[:-1], rope), "[batch, tokens, heads, rope]")
    if ckv_cache.shape[-1] != q_nope.shape[-1]:
        raise ValueError(
            f"ckv_cache: got shape {ckv_cache.shape}, expected a last axis of "
            f"{q_nope.shape[-1]}, q_nope's latent"
        )
    pages = (*ckv_cache.shape[:2], rope)
    _check_shape("kpe_cache", kpe_cache, pages, "ckv_cache's pages and q_pe's rope")
    batch = q_nope.shape[0]
    _check_shape("start", start, (batch,), "one a request")
    _check_shape("length", length, (batch,), "one a request")
    if page_ids.ndim != 1 or page_ids.shape[0] == 0:
        raise ValueError(f"page_ids: got shape {page_ids.shape}, expected a non-empty vector")
    dtype = q_nope.dtype
    if str(dtype) not in FLOATS:
        raise TypeError(f"q_nope: got dtype {dtype}, expected one of {', '.join(FLOATS)}")
    named = {"q_pe": q_pe, "ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
    for name, array in named.items():
        if array.dtype != dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {dtype}, q_nope's")
    for name, array in {"page_ids": page_ids, "start": start, "length": length}.items():
        if array.dtype != jnp.int32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
