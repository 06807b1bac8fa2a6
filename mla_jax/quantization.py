"""FP8 block-scaled weights, as DeepSeek-V3's checkpoints store them (arXiv:2412.19437, 3.3)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

DEFAULT_BLOCK = (128, 128)


def weight_block_size(config: dict[str, Any]) -> tuple[int, int]:
    """The (rows, columns) that share a scale, from a config.json's `quantization_config`.

    Errors: ValueError for another method than block-scaled FP8, or a size that is not two positive
    integers.

    >>> weight_block_size({"quantization_config": {"quant_method": "fp8"}})
    (128, 128)
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"quantization_config: got {settings!r}, expected an object")
    method = settings.get("quant_method", "fp8")
    if method != "fp8":
        raise ValueError(f"quant_method = {method!r} is not supported, expected 'fp8'")
    block = settings.get("weight_block_size") or DEFAULT_BLOCK
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"weight_block_size: got {block!r}, expected two positive integers")
    return sizes


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
