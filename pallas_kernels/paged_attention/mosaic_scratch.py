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
) -> dict[str, Any]:
    """What `tiles.order` needs.

    rows: of a request's queries that a block holds, a multiple of 8. boxes: arrivals that make a
    tile's keys.
    """
    own = (
        _of_twins(tiles, rows, latent, rope, boxes, dtype)
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
    tiles: MosaicTiles, rows: int, latent: int, rope: bool, boxes: int, dtype: Any
) -> dict[str, Any]:
    stripes, turns = latent // STRIPE, tiles.takes_turns
    readers, rope_places = (1, 2) if turns else (2, ROPE_PLACES)
    found = {
        "q_s": _tiled(dtype, stripes, rows, STRIPE),
        **({"q_rope_s": _tiled(dtype, 1, rows, BOX)} if rope else {}),
        **({"rope_s": _tiled(dtype, rope_places, KEYS, BOX)} if rope else {}),
        "p_s": _tiled(dtype, 2, rows, KEYS),
        # Each warp's maxima and sums, of either twin.
        "top_s": plgpu.SMEM((2, 4 * rows), jnp.float32),
    }
    if turns:
        # What each consumer has summed of the other's half, its maxima and its sums.
        found["stage_s"] = plgpu.SMEM((2, latent // 2, rows), jnp.float32)
        found["sums_s"] = plgpu.SMEM((2, 2, rows), jnp.float32)
    taken = sum(jnp.dtype(s.dtype).itemsize * math.prod(s.shape) for s in found.values())
    places = (SHARED_BYTES - BARRIER_BYTES - taken) // (KEYS * STRIPE * jnp.dtype(dtype).itemsize)
    if turns:
        # A tile each, so that a place is always the same consumer's: it must see every phase of a
        # barrier.
        places = 2 * stripes
    return {
        **found,
        "k_s": _tiled(dtype, places, KEYS, STRIPE),
        "q_full": plgpu.Barrier(num_arrivals=stripes + rope),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_barriers=places, num_arrivals=boxes),
        "free": plgpu.Barrier(num_barriers=places, num_arrivals=readers),
        "full_rope": plgpu.Barrier(num_barriers=rope_places, num_arrivals=boxes),
        "free_rope": plgpu.Barrier(num_barriers=rope_places, num_arrivals=readers),
        "met": plgpu.Barrier(num_arrivals=2),
    }


def _tiled(dtype: Any, *shape: int):
    """In boxes of 64 columns, swizzled, as the copy engine and the products want them."""
    swizzled = (plgpu.TilingTransform((8, BOX)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=swizzled)
