"""Latent attention over pages for Hopper, in Pallas' Mosaic GPU dialect.

A worker is a thread block that holds 64 query rows, or a cluster of two such blocks, which receive
every tile of keys by multicast. It does the segments that the plan gives it, one after the other.
In a block, a producer warpgroup fills two tiles of 64 keys, and two consumers take turns:
consumer w scores tile w of a pair and takes its softmax, and both sum the latents of both tiles,
each for its own half of the output's columns, which fills its registers. While one waits for its
softmax, the other keeps the tensor cores busy.

    consumer 0: scores 0 . softmax 0 . values 0 (left)               . values 1 (left)
    consumer 1: scores 1 .             values 0 (right) | softmax 1  . values 1 (right)

Consumer 1's softmax runs beside the products of tile 0. A consumer hands its probabilities to the
other in shared memory, in the place from which it took the queries' rope columns into registers.
Each half of a tile goes back to the producer as soon as the consumer of that half has used it.
mosaic_producer.py and mosaic_consumer.py hold the two roles.
"""

# Older versions of jax, which `unsupported` refuses, have no interpreter of this dialect.
# pyright: reportAbstractUsage=false, reportAttributeAccessIssue=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.mosaic_block import (
    BOX,
    CLUSTER,
    GRID,
    KEYS,
    PAIR,
    ROWS,
    THREAD,
    Block,
    MosaicTiles,
)
from pallas_kernels.paged_attention.mosaic_consumer import consume
from pallas_kernels.paged_attention.mosaic_producer import produce

__all__ = ["BOX", "KEYS", "PAIR", "ROWS", "MosaicTiles", "attend_pages_mosaic"]


def _kernel(
    *refs,
    tiles: MosaicTiles,
    rows: int,
    heads: int,
    tokens: int,
    rope: bool,
    interpret: bool,
):
    """Gives every warpgroup of a block its role; refs: inputs, outputs, scratch."""
    names = (
        *("q_nope", *(("q_pe",) if rope else ()), "ckv", *(("kpe",) if rope else ())),
        *("ids", "scale", "work"),
        *("out", "lse", "part", "part_lse"),
        *("q_s", "k_s", "rope_s", "p_s", "max_s", "sum_s"),
        *(("q_rope_s",) if interpret and rope else ()),
        *("q_full", "q_free", "full", "full_rope", "free", "p_ready", "both"),
    )
    by_name = dict(zip(names, refs, strict=True))
    worker = lax.axis_index(GRID)
    thread = lax.axis_index(THREAD)
    block = lax.axis_index(CLUSTER) if tiles.cluster > 1 else jnp.int32(0)
    stand = Block(by_name, tiles, min(rows, ROWS), heads, tokens, rope, interpret, worker, block)

    for w in (0, 1):

        @pl.when(thread == w)
        def _(w=w):
            plgpu.set_max_registers(232, action="increase")
            consume(stand, w)

    @pl.when(thread == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        produce(stand)


# Jitted, so that a program with many layers lowers the kernel, a second's work, once.
@functools.partial(
    jax.jit,
    static_argnames=("workers", "slots", "rows", "heads", "tokens", "tiles", "interpret"),
)
def attend_pages_mosaic(
    q_nope: Float[Array, "all_rows latent"],
    q_pe: Float[Array, "all_rows rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    sm_scale: Float[Array, ""],
    work: Int[Array, "rows_of_work 12"],
    *,
    workers: int,
    slots: int,
    rows: int,
    heads: int,
    tokens: int,
    tiles: MosaicTiles,
    interpret: bool,
):
    """(out, lse, part, part_lse): results of whole units, and of the parts of split ones.

    rows: of a request, padded to a multiple of 8, or, if more than 64, of `cluster` blocks'.
    work: `workers` rows of (the first of a worker's segments, the last + 1, the first one's row of
    Work.segments), so that a worker can start after one load, then a row for each segment, the same
    with two numbers that mean nothing.
    """
    all_rows, latent = q_nope.shape
    rope = q_pe.shape[-1]
    dtype = q_nope.dtype
    half = latent // 2
    swizzled = (plgpu.TilingTransform((8, BOX)), plgpu.SwizzleTransform(128))

    def shared(*shape, tiled=True):
        kind = dtype if tiled else jnp.float32
        return plgpu.SMEM(shape, kind, transforms=swizzled if tiled else ())

    boxes = max(1, KEYS // ckv_cache.shape[1])
    if tiles.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_barriers=4)
        cluster = {"cluster": (tiles.cluster,), "cluster_names": (CLUSTER,)}
    else:
        free = plgpu.Barrier(num_barriers=4)
        cluster = {}
    with_rope = (q_pe,) if rope else ()
    args = (q_nope, *with_rope, ckv_cache, *((kpe_cache,) if rope else ()))
    slot_rows = ROWS * tiles.cluster
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            rows=rows,
            heads=heads,
            tokens=tokens,
            rope=rope > 0,
            interpret=interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct((all_rows, latent), dtype),
            jax.ShapeDtypeStruct((all_rows,), jnp.float32),
            jax.ShapeDtypeStruct((max(slots, 1), slot_rows, latent), jnp.float32),
            jax.ShapeDtypeStruct((max(slots, 1), slot_rows), jnp.float32),
        ],
        grid=(workers,),
        grid_names=(GRID,),
        **cluster,
        num_threads=3,
        thread_name=THREAD,
        scratch_types=[
            shared(2, ROWS, half),
            shared(2, 2, KEYS, half),
            shared(2, KEYS, BOX),
            shared(2, ROWS, BOX),
            shared(2, ROWS, tiled=False),
            shared(2, ROWS, tiled=False),
            *((shared(2, ROWS, BOX),) if interpret and rope else ()),
            plgpu.Barrier(num_arrivals=4 if rope else 2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=4, num_arrivals=boxes),
            plgpu.Barrier(num_barriers=2, num_arrivals=boxes),
            free,
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # All that needs one is synchronised by hand.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        kernel_name="mla_paged_attention_mosaic",
    )
    return run(*args, page_ids, sm_scale.reshape(1), work)
