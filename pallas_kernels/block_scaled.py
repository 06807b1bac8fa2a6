"""Matrices in FP8 (float8_e4m3fn) with a scale a block, and products with them.

Source: DeepSeek-V3 (arXiv:2412.19437, 3.3): weights have a scale for each block of 128 x 128,
activations one for each row's group of 128 columns, made when they are multiplied.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from pallas_kernels.precision import FP8, GROUP

LARGEST = 448.0
"""The greatest e4m3 number: what is beyond it becomes NaN."""
LEAST_AMAX = 1e-4
"""A group whose numbers are smaller than this is scaled as if one were this large."""
DEFAULT_BLOCK = (128, 128)
MOST_PARTIALS = 2**26
"""Float32 numbers that `scaled_product` holds beside its result: products not yet scaled."""


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight [*stack, m, n]: one a block, ragged edges included.

    >>> scale_shape((576, 7168), (128, 128))
    (5, 56)
    """
    *stack, m, n = shape
    return (*stack, -(-m // block[0]), -(-n // block[1]))


@partial(jax.jit, static_argnames=("dtype", "block_size"))
def dequantize_blocks(
    weight: Float[Array, "*stack m n"],
    scale_inv: Float[Array, "*stack m_blocks n_blocks"],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    block_size: tuple[int, int] = DEFAULT_BLOCK,
) -> Float[Array, "*stack m n"]:
    """weight[i, j] * scale_inv[i // rows, j // columns], multiplied in float32, then rounded once.

    weight: float8_e4m3fn. scale_inv: float32, what checkpoints call `weight_scale_inv`; despite
    its name it is the multiplier. Sizes need not be multiples of the block. Errors: ValueError if
    there is not one scale a block.

    >>> weight = jnp.ones((2, 3), jnp.float8_e4m3fn)
    >>> dequantize_blocks(weight, jnp.array([[0.5, 2.0]]), jnp.float32, block_size=(2, 2))
    Array([[0.5, 0.5, 2. ],
           [0.5, 0.5, 2. ]], dtype=float32)
    """
    expected = scale_shape(weight.shape, block_size)
    if scale_inv.shape != expected:
        raise ValueError(
            f"scale_inv: got shape {scale_inv.shape}, expected {expected} for a weight "
            f"{weight.shape} in blocks of {block_size}"
        )
    *_, m, n = weight.shape
    rows = jnp.arange(m)[:, None] // block_size[0]
    columns = jnp.arange(n) // block_size[1]
    scales = scale_inv[..., rows, columns].astype(jnp.float32)
    return (weight.astype(jnp.float32) * scales).astype(dtype)


def scale_of(amax: Float[Array, "*shape"], power_of_two: bool = False) -> Float[Array, "*shape"]:
    """The scale of a group whose greatest magnitude is `amax`: max(amax, 1e-4) / 448."""
    scale = jnp.maximum(amax, LEAST_AMAX) / LARGEST
    if power_of_two:
        # The next power of two, by the exponent: a rounded log2 could be off by one.
        fraction, exponent = jnp.frexp(scale)
        scale = jnp.ldexp(jnp.ones_like(scale), jnp.where(fraction == 0.5, exponent - 1, exponent))
    return scale


def to_fp8(scaled: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest e4m3 numbers; what lies beyond the greatest becomes it."""
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(FP8)


def quantize_groups(
    x: Float[Array, "*rows width"], *, power_of_two: bool = False
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows groups"]]:
    """(e4m3 values, float32 scales) of each row's groups of 128 columns: x is values * scales.

    A scale is max(amax, 1e-4) / 448 over its group; power_of_two (ue8m0): the next power of two.
    The last group is what is left of a row. A group with a NaN has NaN as its scale.

    >>> values, scales = quantize_groups(jnp.array([[448.0, 1.0], [0.0, 7.0]]))
    >>> values.astype(jnp.float32).tolist(), scales.tolist()
    ([[448.0, 1.0], [0.0, 448.0]], [[1.0], [0.015625]])
    """
    *rows, width = x.shape
    groups = -(-width // GROUP)
    x = x.astype(jnp.float32)
    padded = jnp.pad(x, [*((0, 0) for _ in rows), (0, groups * GROUP - width)])
    amax = jnp.abs(padded).reshape(*rows, groups, GROUP).max(axis=-1)
    scales = scale_of(amax, power_of_two)
    return to_fp8(x / spread_scales(scales, width)), scales


def spread_scales(scales: Float[Array, "*rows groups"], width: int) -> Float[Array, "*rows width"]:
    """The scale of each of `width` columns, whose groups are of 128.

    >>> spread_scales(jnp.array([2.0, 3.0]), 130)[126:].tolist()
    [2.0, 2.0, 3.0, 3.0]
    """
    return jnp.repeat(scales, GROUP, axis=-1)[..., :width]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaled:
    """A matrix [out, in], or a stack of them, in float8_e4m3fn: a pytree.

    It is values[.., i, j] * scales[.., i // rows, j // columns], scales being float32 and
    block_size (rows, columns). power_of_two: so are the scales of what it is multiplied with.

    >>> weight = BlockScaled.of_shape((2, 576, 7168))
    >>> weight.shape, weight.scales.shape, weight.dtype
    ((2, 576, 7168), (2, 5, 56), dtype(float8_e4m3fn))
    """

    values: Float[Array, "*stack out in"]
    scales: Float[Array, "*stack out_blocks in_blocks"]
    block_size: tuple[int, int] = dataclasses.field(
        default=DEFAULT_BLOCK, metadata={"static": True}
    )
    power_of_two: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of_shape(
        cls,
        shape: tuple[int, ...],
        block_size: tuple[int, int] = DEFAULT_BLOCK,
        *,
        power_of_two: bool = False,
    ) -> Self:
        """One of `jax.ShapeDtypeStruct`s, which holds no numbers yet."""
        values: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(FP8))
        scales: Any = jax.ShapeDtypeStruct(scale_shape(shape, block_size), jnp.float32)
        return cls(values=values, scales=scales, block_size=block_size, power_of_two=power_of_two)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    def __getitem__(self, index: Any) -> Self:
        """A part of the stack; `...` is all of it."""
        return dataclasses.replace(self, values=self.values[index], scales=self.scales[index])

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "*stack out in"]:
        """The matrix as plain numbers, multiplied in float32 and rounded once."""
        return dequantize_blocks(self.values, self.scales, dtype, block_size=self.block_size)


def scaled_product(x: Float[Array, "*batch in"], weight: BlockScaled) -> Float[Array, "..."]:
    """x W^T [*batch, *stack, out] in float32, x being quantised by groups of 128 columns.

    Columns that share both scales are multiplied exactly and summed in float32, then scaled, then
    summed. Of products not yet scaled no more than `MOST_PARTIALS` exist at a time. For
    inference: its derivative is that of rounding.

    >>> weight = BlockScaled(
    ...     values=jnp.full((3, 130), 2, jnp.float8_e4m3fn), scales=jnp.array([[0.5, 1.0]])
    ... )
    >>> scaled_product(jnp.ones((1, 130)), weight).tolist()
    [[132.0, 132.0, 132.0]]
    """
    width = x.shape[-1]
    values, scales = quantize_groups(x.reshape(-1, width), power_of_two=weight.power_of_two)
    block_rows, block_columns = weight.block_size
    row_scales = jnp.repeat(weight.scales, block_rows, axis=-2)[..., : weight.shape[-2], :]
    step = math.gcd(GROUP, block_columns)
    steps = -(-width // step)

    def split(values: Array) -> Array:
        padded = jnp.pad(values.reshape(-1, width), ((0, 0), (0, steps * step - width)))
        return padded.reshape(-1, steps, step)

    def spread(scales: Array, columns: int) -> Array:
        return jnp.repeat(scales.reshape(-1, scales.shape[-1]), columns // step, axis=1)[:, :steps]

    rows = (split(values), spread(scales, GROUP))
    matrix = (split(weight.values), spread(row_scales, block_columns))
    outputs = rows[0].shape[0] * matrix[0].shape[0]
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    at_once = max((n for n in divisors if n * outputs <= MOST_PARTIALS), default=1)

    def add(i: Array, total: Array) -> Array:
        (x, x_scales), (w, w_scales) = jax.tree.map(
            lambda array: lax.dynamic_slice_in_dim(array, i * at_once, at_once, axis=1),
            (rows, matrix),
        )
        # bfloat16 holds every e4m3 number, and every device multiplies it; on GPUs XLA converts the
        # weight inside the product's kernel, which reads e4m3.
        partials = jnp.einsum(
            "tsk,osk->sto",
            *(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
            preferred_element_type=jnp.float32,
        )
        return total + (partials * x_scales.T[..., None] * w_scales.T[:, None]).sum(axis=0)

    zeros = jnp.zeros((rows[0].shape[0], matrix[0].shape[0]), jnp.float32)
    total = lax.fori_loop(0, steps // at_once, add, zeros)
    return total.reshape(*x.shape[:-1], *weight.shape[:-1])
