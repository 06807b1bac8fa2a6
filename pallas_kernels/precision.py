"""How exactly a product is computed: the one place that decides."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike


def precision_for(dtype: DTypeLike) -> lax.Precision | None:
    """float32 in float32, where a GPU's default would be TF32; the default for other dtypes."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
