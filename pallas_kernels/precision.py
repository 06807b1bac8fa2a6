"""How exactly a product is computed: the one place that decides."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

FP8 = "float8_e4m3fn"
GROUP = 128
"""Columns of a row of FP8 numbers that share a scale."""


def precision_for(dtype: DTypeLike) -> lax.Precision | None:
    """float32 in float32, where a GPU's default would be TF32; the default for other dtypes."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
