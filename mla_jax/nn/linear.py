"""Parameters that know their shards, and products that honour their dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.block_scaled import BlockScaled, scaled_product
from pallas_kernels.precision import precision_for


class Weight(nnx.Param):
    """Matrices [.., out, in] that only `product`, `plain` and the experts' kernel read.

    So it may hold a `BlockScaled` in place of an array, whose values and scales are split over a
    mesh alike.
    """


def einsum(spec: str, *operands: Array, out: DTypeLike | None = None) -> Array:
    """jnp.einsum that computes float32 in float32: a GPU's default would be TF32."""
    precision = precision_for(operands[0].dtype)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=out)


def product(
    x: Float[Array, "*batch inputs"], weight: Float[Array, "*outputs inputs"] | BlockScaled
) -> Float[Array, "..."]:
    """x W^T [*batch, *outputs] in x's dtype; of a block-scaled weight as `scaled_product` says."""
    if isinstance(weight, BlockScaled):
        return scaled_product(x, weight).astype(x.dtype)
    outputs = "opq"[: weight.ndim - 1]
    return einsum(f"...i,{outputs}i->...{outputs}", x, weight)


def plain(weight: Float[Array, "*shape"] | BlockScaled, dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The weight as an array, for what is no product with it: block-scaled ones in `dtype`."""
    return weight.dequantized(dtype) if isinstance(weight, BlockScaled) else weight


def normal_param(
    shape: tuple[int, ...],
    dtype: str,
    rngs: nnx.Rngs,
    shards: tuple[str | None, ...],
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A parameter drawn from N(0, 1 / fan_in), `shards` naming the mesh axis of each axis."""
    value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
    return kind(value, out_sharding=shards, eager_sharding=False)


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
        self.weight = normal_param((outputs, inputs), dtype, rngs, shards, Weight)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return product(x, self.weight[...])
