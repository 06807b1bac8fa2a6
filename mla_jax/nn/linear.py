"""Parameters that know their shards, and products that honour their dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.precision import precision_for


def einsum(spec: str, *operands: Array, out: DTypeLike | None = None) -> Array:
    """jnp.einsum that computes float32 in float32: a GPU's default would be TF32."""
    precision = precision_for(operands[0].dtype)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=out)


def normal_param(
    shape: tuple[int, ...], dtype: str, rngs: nnx.Rngs, shards: tuple[str | None, ...]
) -> nnx.Param:
    """A parameter drawn from N(0, 1 / fan_in), `shards` naming the mesh axis of each axis."""
    value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
    return nnx.Param(value, out_sharding=shards, eager_sharding=False)


class Linear(nnx.Module):
    """y = x W^T with `weight` [out, in]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: str,
        *,
        rngs: nnx.Rngs,
        shards: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.weight = normal_param((outputs, inputs), dtype, rngs, shards)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return einsum("...i,oi->...o", x, self.weight[...])
