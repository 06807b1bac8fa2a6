"""Queries that each list their cached tokens, and their float64 oracle, from the contract."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from oracles import float64, softmax_sum

from mla_jax.quantization import quantize_cache

# Quantiles of the absolute error of values of order 1, by dtype.
OUT = {
    "float32": {0.99: 2e-6, 1.0: 1e-5},
    "bfloat16": {0.99: 1e-2, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {0.99: 5e-6, 1.0: 2e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListCase:
    """The arrays of a `token_sparse` call."""

    q_nope: jax.Array
    q_pe: jax.Array
    ckv_cache: jax.Array
    kpe_cache: jax.Array
    indices: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def queries(self, at: Sequence[int] | np.ndarray) -> "ListCase":
        """Some of the queries, over the same pools."""
        at = np.asarray(at)
        names = ("q_nope", "q_pe", "indices")
        return dataclasses.replace(self, **{name: getattr(self, name)[at] for name in names})


def make_lists(
    rng: np.random.Generator,
    counts: Sequence[int],
    *,
    heads: int,
    topk: int = 128,
    page_size: int = 16,
    gaps: bool = True,
    latent: int = 64,
    rope: int = 16,
    dtype: str = "float32",
    num_pages: int | None = None,
) -> ListCase:
    """Query t sees counts[t] tokens of a pool that is NaN wherever no query looks.

    A query's tokens come in any order, no token twice in a list, with the -1 of its other places
    between them (`gaps`) or behind them. `num_pages` fixes the pool's size.
    """
    num_pages = num_pages or -(-(max(counts) + 9) // page_size)
    slots = num_pages * page_size
    indices = np.full((len(counts), topk), -1, np.int32)
    for row, count in zip(indices, counts, strict=True):
        places = rng.permutation(topk)[:count] if gaps else np.arange(count)
        row[places] = rng.permutation(slots)[:count]
    pool = np.full((slots, latent + rope), np.nan, np.float32)
    used = np.unique(indices[indices >= 0])
    pool[used] = rng.standard_normal((len(used), latent + rope))
    pool = pool.reshape(num_pages, page_size, -1)
    q = rng.standard_normal((len(counts), heads, latent + rope))
    return ListCase(
        q_nope=jnp.asarray(q[..., :latent], dtype),
        q_pe=jnp.asarray(q[..., latent:], dtype),
        ckv_cache=jnp.asarray(pool[..., :latent], dtype),
        kpe_cache=jnp.asarray(pool[..., latent:], dtype),
        indices=jnp.asarray(indices),
    )


def attend_lists(case: ListCase, sm_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse) of each query over the tokens that it lists: no order, no causality."""
    q_nope, q_pe, ckv, kpe = (float64(array) for array in case.args[:4])
    page_size = ckv.shape[1]
    out, lse = np.zeros(q_nope.shape), np.full(q_nope.shape[:2], -np.inf)
    for query, row in enumerate(np.asarray(case.indices)):
        listed = [divmod(int(i), page_size) for i in row if 0 <= i < ckv.shape[0] * page_size]
        if listed:
            page, offset = np.asarray(listed).T
            keys, rope = ckv[page, offset], kpe[page, offset]
            scores = q_nope[query] @ keys.T + q_pe[query] @ rope.T
            out[query], lse[query] = softmax_sum(scores * sm_scale, keys)
    return out, lse


def in_fp8(
    case: ListCase, layout: Literal["slot", "tensor"]
) -> tuple[ListCase, jax.Array, ListCase]:
    """The case's arrays over an e4m3 cache, its kv_scales, and what these stand for."""
    cache = quantize_cache(case.ckv_cache, case.kpe_cache, layout=layout)
    scales = np.asarray(cache.scales, np.float64)
    ckv, kpe = float64(cache.ckv), float64(cache.kpe)
    if layout == "tensor":
        meant = ckv * scales, kpe * scales
    else:
        meant = ckv * np.repeat(scales, 128, axis=-1)[..., : ckv.shape[-1]], kpe
    pools = {"ckv_cache": cache.ckv, "kpe_cache": cache.kpe}
    stored = dataclasses.replace(case, **pools)
    exact = dataclasses.replace(case, ckv_cache=meant[0], kpe_cache=meant[1])  # NumPy's
    return stored, cache.scales, exact
