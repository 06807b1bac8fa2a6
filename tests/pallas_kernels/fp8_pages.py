"""Paged cases over a float8_e4m3fn cache, and what the numbers in it stand for."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from oracles import PagedCase, float64, make_paged, paged_attention
from token_lists import ListCase

FP8 = "float8_e4m3fn"
Case = TypeVar("Case", PagedCase, ListCase)
KINDS = ("slot", "tensor", "tensor_kpe", "one")
"""Scales of slots and columns; one for the latents, or for both pools; none, which is 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Case:
    """A `paged_decode` call over e4m3 pools: `case` has these, `exact` what they stand for."""

    case: PagedCase
    kv_scales: jax.Array | None
    exact: PagedCase

    def want(self, sm_scale: float, *, rounded: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of attention over these numbers; `rounded` to the queries' dtype, as they are
        where they come through registers."""
        return paged_attention(as_operands(self.exact) if rounded else self.exact, sm_scale)


def as_operands(exact: Case) -> Case:
    """The case with pools of NumPy's float64 rounded to the queries' dtype.

    So they are for the tensor cores, whose other operand is of that dtype.
    """
    dtype = exact.q_nope.dtype
    pools = {
        name: float64(np.asarray(getattr(exact, name)).astype(np.float32).astype(dtype))
        for name in ("ckv_cache", "kpe_cache")
    }
    return dataclasses.replace(exact, **pools)


def make_fp8(rng: np.random.Generator, kind: str, *, dtype: str = "float32", **sizes) -> Fp8Case:
    """`make_paged`, its keys rounded to e4m3 as they are and multiplied with random scales.

    NaN stands wherever no request reads, in the scales too. The products are exact in float64.
    """
    case = make_paged(rng, dtype=dtype, **sizes)
    ckv = np.asarray(case.ckv_cache.astype(FP8))
    kpe = np.asarray(case.kpe_cache.astype(FP8 if kind == "tensor_kpe" else dtype))
    exact, exact_kpe = float64(ckv), float64(kpe)
    unused = np.isnan(exact).all(axis=-1)
    if kind == "slot":
        groups = -(-ckv.shape[-1] // 128)
        scales = rng.uniform(0.3, 1.0, (*ckv.shape[:2], groups)).astype(np.float32)
        scales[unused] = np.nan
        exact = exact * np.repeat(float64(scales), 128, axis=-1)[..., : ckv.shape[-1]]
    else:
        scales = np.float32(1 if kind == "one" else rng.uniform(0.3, 1.0))
        exact = exact * float(scales)
        if kind == "tensor_kpe":
            exact_kpe = exact_kpe * float(scales)
    assert unused.any()
    return Fp8Case(
        case=dataclasses.replace(case, ckv_cache=jnp.asarray(ckv), kpe_cache=jnp.asarray(kpe)),
        kv_scales=None if kind == "one" else jnp.asarray(scales),
        # NumPy's, since float64 is no dtype of JAX's here.
        exact=dataclasses.replace(case, ckv_cache=exact, kpe_cache=exact_kpe),  # pyright: ignore[reportArgumentType]
    )
