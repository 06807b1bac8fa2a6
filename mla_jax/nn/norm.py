"""Normalisation by the root mean square, and by mean and variance."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, rounded to x's dtype, times `weight` (arXiv:1910.07467)."""

    def __init__(self, dim: int, dtype: str, *, eps: float = 1e-6) -> None:
        self.weight = nnx.Param(jnp.ones(dim, dtype), out_sharding=(None,), eager_sharding=False)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt((x32 * x32).mean(axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype) * self.weight[...]


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * `weight` + `bias` in float32, rounded once (arXiv:1607.06450)."""

    def __init__(self, dim: int, dtype: str, *, eps: float = 1e-6) -> None:
        self.weight = nnx.Param(jnp.ones(dim, dtype), out_sharding=(None,), eager_sharding=False)
        self.bias = nnx.Param(jnp.zeros(dim, dtype), out_sharding=(None,), eager_sharding=False)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        centred = x.astype(jnp.float32)
        centred -= centred.mean(axis=-1, keepdims=True)
        normal = centred * lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + self.eps)
        weight, bias = (w[...].astype(jnp.float32) for w in (self.weight, self.bias))
        return (normal * weight + bias).astype(x.dtype)
