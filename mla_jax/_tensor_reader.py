"""Ranges of a checkpoint's tensor, put on devices and converted there."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mla_jax._safetensors import CheckpointError, StoredTensor
from mla_jax.sharding.assembly import Bounds
from mla_jax.sharding.mesh import Device
from pallas_kernels.block_scaled import dequantize_blocks


@partial(jax.jit, static_argnames=("kept", "shape", "dtype", "block"))
def _converted(
    tensor: Array,
    scale: Array | None,
    *,
    kept: Bounds,
    shape: tuple[int, ...],
    dtype: str,
    block: tuple[int, int],
) -> tuple[Array, Bool[Array, ""]]:
    """(what is `kept` of the tensor, in `shape` and `dtype`; whether all of it is finite)."""
    if scale is None:
        value = tensor.astype(dtype)
    else:
        value = dequantize_blocks(tensor, scale, dtype, block_size=block)
    value = value[tuple(slice(*bounds) for bounds in kept)]
    return value.reshape(shape), jnp.isfinite(value).all()


def _whole_blocks(bounds: Bounds, shape: tuple[int, ...], block: tuple[int, int]) -> Bounds:
    """`bounds` widened to whole blocks of a matrix, or of a stack of them, of this shape."""
    sizes = (*(1 for _ in shape[:-2]), *block)
    return tuple(
        (start // size * size, min(-(-stop // size) * size, length))
        for (start, stop), size, length in zip(bounds, sizes, shape, strict=True)
    )


def reader(
    tensor: StoredTensor, scale: StoredTensor | None, dtype: str, block: tuple[int, int]
) -> Callable[[Bounds, Device | None], Array]:
    """piece(bounds, device): a range of the tensor, on the device and in `dtype`.

    Each range of rows is read once, however many devices want some of it.
    """

    def loaded(source: StoredTensor, bounds: Bounds, device: Device | None) -> Array:
        rows, *rest = bounds
        # A copy even where the device is the host, which would otherwise keep what was read.
        part = read[source.name](*rows)[(slice(None), *(slice(*columns) for columns in rest))]
        return jnp.array(part, device=device)

    read = {source.name: cache(source.read) for source in (tensor, scale) if source is not None}

    def piece(bounds: Bounds, device: Device | None) -> Array:
        shape = tuple(stop - start for start, stop in bounds)
        if len(bounds) > len(tensor.shape):
            # Fused experts have gate and up in one axis, which no mesh splits.
            bounds = (bounds[0], *((0, size) for size in tensor.shape[1:]))
        stored, scales = bounds, None
        if scale is not None:
            stored = _whole_blocks(bounds, tensor.shape, block)
            sizes = (*(1 for _ in bounds[:-2]), *block)
            blocks = tuple((a // n, -(-b // n)) for (a, b), n in zip(stored, sizes, strict=True))
            scales = loaded(scale, blocks, device)
        kept = tuple((a - at, b - at) for (a, b), (at, _) in zip(bounds, stored, strict=True))
        value, is_finite = _converted(
            loaded(tensor, stored, device), scales, kept=kept, shape=shape, dtype=dtype, block=block
        )
        # Reading the flag also waits for the device, so that only one tensor is ever on its way.
        if not is_finite:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: not finite in {dtype}")
        return value

    return piece
