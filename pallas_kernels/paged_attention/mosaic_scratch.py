"""The shared memory and the barriers of a block of the Mosaic GPU kernel, by name."""

# pyright: reportAbstractUsage=false

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import (
    BOX,
    CLUSTER,
    KEYS,
    ROWS,
    STAGES,
    STRIPE,
    MosaicTiles,
)
from pallas_kernels.paged_attention.mosaic_unpack import OPERAND
from pallas_kernels.precision import FP8

SHARED_BYTES = 232_448
"""What a block may have on Hopper."""
BARRIER_BYTES = 1024
"""More than all barriers take, with what aligns them."""
ROPE_PLACES = 3


def scratch(
    tiles: MosaicTiles,
    *,
    rows: int,
    latent: int,
    rope: bool,
    sparse: bool,
    boxes: int,
    dtype: Any,
    packed: Any = None,
    groups: int = 0,
) -> dict[str, Any]:
    """What `tiles.order` needs.

    rows: of a request's queries that a block holds, a multiple of 8. boxes: arrivals that make a
    tile's keys. packed: the rope keys' dtype, where latents lie as e4m3; groups: of columns, whose
    keys have scales of their own there.
    """
    own = (
        _of_twins(tiles, rows, latent, rope, boxes, dtype, packed, groups)
        if tiles.few_rows
        else _of_halves(tiles, latent, rope, boxes, dtype)
    )
    if sparse:
        # 0 for a key that there is, else the lowest score.
        places = own["rope_s"].shape[0] if tiles.few_rows else STAGES
        own["bias_s"] = plgpu.SMEM((places, KEYS), jnp.float32)
    return own


def _of_halves(
    tiles: MosaicTiles, latent: int, rope: bool, boxes: int, dtype: Any
) -> dict[str, Any]:
    half = latent // 2
    consumers = 2 if tiles.order == "seesaw" else 1  # that close a segment
    free = plgpu.Barrier(num_barriers=2 * STAGES)
    if tiles.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_barriers=2 * STAGES)
    return {
        "k_s": _tiled(dtype, STAGES, 2, KEYS, half),
        # Keys' rope columns, then the probabilities.
        "p_s": _tiled(dtype, STAGES, KEYS, BOX),
        # A factor or a maximum of each tile, then of each result; log-sum-exps.
        "row_s": plgpu.SMEM((2 * STAGES + 1, ROWS), jnp.float32),
        "q_s": _tiled(dtype, 2, ROWS, half),
        **({"q_rope_s": _tiled(dtype, 1, ROWS, BOX)} if rope else {}),
        "q_full": plgpu.Barrier(num_arrivals=3 if rope else 2),
        "q_free": plgpu.Barrier(num_arrivals=consumers),
        "full": plgpu.Barrier(num_barriers=2 * STAGES, num_arrivals=boxes),
        "full_rope": plgpu.Barrier(num_barriers=STAGES, num_arrivals=boxes),
        "free": free,
        "p_ready": plgpu.Barrier(num_barriers=STAGES),
        "done": plgpu.Barrier(num_barriers=STAGES, num_arrivals=consumers),
    }


def _of_twins(
    tiles: MosaicTiles,
    rows: int,
    latent: int,
    rope: bool,
    boxes: int,
    dtype: Any,
    packed: Any,
    groups: int,
) -> dict[str, Any]:
    stripes, turns = latent // STRIPE, tiles.takes_turns
    readers, rope_places = (1, 2) if turns else (2, ROPE_PLACES)
    own_rows = rows // 2 if tiles.shares_rows else rows
    keys = rope_keys = rope_dtype = dtype
    if packed:
        dtype, keys, rope_keys = OPERAND, jnp.dtype(FP8), packed
        rope_dtype = OPERAND if packed == FP8 else packed
        rope_places = 4  # the tiles that there may be; turns need an even number
    swizzled = {
        "q_s": _tiled(dtype, stripes, rows, STRIPE),
        **({"q_rope_s": _tiled(rope_dtype, 1, rows, BOX)} if rope else {}),
        **({"rope_s": _tiled(rope_keys, rope_places, KEYS, BOX)} if rope else {}),
        # Probabilities, once for each group of columns that has scales of its own.
        "p_s": _tiled(dtype, 2, max(groups, 1), own_rows, KEYS),
    }
    small = {  # behind the rest, which stands at multiples of 1,024 bytes
        # A factor of each row's scores.
        **({"q_factor_s": plgpu.SMEM((rows,), jnp.float32)} if packed else {}),
        **({"scales_s": plgpu.SMEM((rope_places, KEYS * groups), jnp.float32)} if groups else {}),
        # Each warp's maxima and sums, of either twin.
        "top_s": plgpu.SMEM((2, 4 * own_rows), jnp.float32),
    }
    if turns:
        # What each consumer has summed of the other's half, its maxima and its sums.
        small["stage_s"] = plgpu.SMEM((2, latent // 2, rows), jnp.float32)
        small["sums_s"] = plgpu.SMEM((2, 2, rows), jnp.float32)
    taken = sum(map(_allocated, (*swizzled.values(), *small.values())))
    places = (SHARED_BYTES - BARRIER_BYTES - taken) // (KEYS * STRIPE * jnp.dtype(keys).itemsize)
    if packed:
        places = min(places, rope_places * stripes)
    if turns:
        places = places // 2 * 2 if packed else 2 * stripes
    return {
        **swizzled,
        "k_s": _tiled(keys, places, KEYS, STRIPE),
        **small,
        "q_full": plgpu.Barrier(num_arrivals=stripes + rope + bool(packed)),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_barriers=places, num_arrivals=boxes),
        "free": plgpu.Barrier(num_barriers=places, num_arrivals=readers),
        "full_rope": plgpu.Barrier(
            num_barriers=rope_places, num_arrivals=boxes * max(1, rope + bool(groups))
        ),
        "free_rope": plgpu.Barrier(num_barriers=rope_places, num_arrivals=readers),
        "met": plgpu.Barrier(num_arrivals=2),
    }


def _allocated(array: Any) -> int:
    """Bytes of shared memory: every array begins at a multiple of 1,024."""
    return -(-jnp.dtype(array.dtype).itemsize * math.prod(array.shape) // 1024) * 1024


def _tiled(dtype: Any, *shape: int):
    """In boxes of 128 bytes of columns, or of all that there are, swizzled, as the copy engine and
    the products want them."""
    size = jnp.dtype(dtype).itemsize
    line = min(2 * BOX, shape[-1] * size)
    swizzled = (plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line))
    return plgpu.SMEM(shape, dtype, transforms=swizzled)
