"""Latent attention over pages for Hopper, in Pallas' Mosaic GPU dialect.

A worker is a thread block that holds up to 64 query rows, or a cluster of two such blocks, which
receive every tile of keys by multicast. It does the segments that the plan gives it, one after the
other. In a block, a producer warpgroup loads tiles of 64 keys, and the consumers share the work in
one of five ways. In all but the turns and the rows, one sums the left half of the output's columns
and one the right half.

The twins, for few rows: keys stand on the products' M, rows on their N, so that up to 32 rows cost
what they are. Both score every tile, and nothing waits for the other. Tiles come in stripes of 128
columns, of which shared memory holds nearly three tiles'.

    consumer 0: scores 0 . softmax 0 . values 0 (left)  . scores 1 ...
    consumer 1: scores 0 . softmax 0 . values 0 (right) . scores 1 ...

The turns, too: each scores every other tile and sums all of its columns; their sums are put
together at a segment's end. Scores are made once, for twice the sums: up to 16 rows have room for
those.

    consumer 0: scores 0 . softmax 0 . values 0 . scores 2 ...
    consumer 1: scores 1 . softmax 1 . values 1 . scores 3 ...

The rows, of an e4m3 cache: each has half of the rows, all columns of their sums, and every tile.

    consumer 0: scores 0 (above) . softmax 0 . values 0 (above) . scores 1 (above) ...
    consumer 1: scores 0 (below) . softmax 0 . values 0 (below) . scores 1 (below) ...

In the other two 64 rows stand on M, and shared memory has room for two tiles. A half of a tile is
loaded anew when the consumer of that half has used it, and the probabilities take the place of its
rope columns.

The line, where memory is the limit: scores and softmax, and two for values. Nobody waits for those
behind; values of one tile are summed while the next one is scored, and a segment's queries load
while the last one's values are summed.

    scores    scores 0 . softmax 0 . scores 1 . softmax 1 . scores 2
    values                         . values 0 . . . . . . . values 1

The seesaw, where the tensor cores are: two consumers in turns, each scoring every other tile. While
one waits for its softmax, the other keeps the tensor cores busy.

    consumer 0: scores 0 . softmax 0 . values 0 (left)               . values 1 (left)
    consumer 1: scores 1 .             values 0 (right) | softmax 1  . values 1 (right)

Turns and rows unpack an e4m3 cache's keys themselves. For more rows, or tokens that a list names,
keys come through the registers of two converters in the producer's place, beside twins, turns or
the seesaw.

mosaic_producer.py or mosaic_converter.py, mosaic_twins.py with mosaic_packed.py for e4m3,
mosaic_scores.py with mosaic_values.py, and mosaic_seesaw.py hold the roles, mosaic_tile.py what the
last two do with a tile.
"""

# Older versions of jax, which `unsupported` refuses, have no interpreter of this dialect.
# pyright: reportAbstractUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

import functools
from collections.abc import Callable
from typing import NamedTuple

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
    ROWS,
    THREAD,
    Block,
    MosaicTiles,
)
from pallas_kernels.paged_attention.mosaic_converter import CONVERTERS, convert
from pallas_kernels.paged_attention.mosaic_packed import pack_queries
from pallas_kernels.paged_attention.mosaic_producer import HALVES, STRIPES, produce
from pallas_kernels.paged_attention.mosaic_scores import score
from pallas_kernels.paged_attention.mosaic_scratch import scratch
from pallas_kernels.paged_attention.mosaic_seesaw import consume
from pallas_kernels.paged_attention.mosaic_twins import consume_alone
from pallas_kernels.paged_attention.mosaic_values import sum_values
from pallas_kernels.precision import FP8

__all__ = ["BOX", "KEYS", "ROWS", "MosaicTiles", "attend_pages_mosaic", "role_names"]

REGISTERS = {"twins": 152, "turns": 144, "seesaw": 192}
"""A thread's of the consumers, beside converters."""
PROFILED = 120
"""Stages of a warpgroup that a profile has room for, in what shared memory is left."""


def _kernel(
    *refs,
    tiles: MosaicTiles,
    rows: int,
    heads: int,
    tokens: int,
    rope: bool,
    sparse: bool,
    slot_scales: bool,
    packed: bool,
    interpret: bool,
    **scratch,
):
    """Gives every warpgroup of a block its role; refs: inputs, outputs."""
    names = (
        *("q_nope", *(("q_pe",) if rope else ()), "ckv", *(("kpe",) if rope else ())),
        *("ids", "scale", "work", *(("q_factor",) if packed else ())),
        *(("key_scales" if packed else "slot_scales",) if slot_scales else ()),
        *("out", "lse", "part", "part_lse"),
    )
    by_name = {**dict(zip(names, refs, strict=True)), **scratch}
    worker = lax.axis_index(GRID)
    thread = lax.axis_index(THREAD)
    block = lax.axis_index(CLUSTER) if tiles.cluster > 1 else jnp.int32(0)
    stand = Block(by_name, tiles, rows, heads, tokens, rope, sparse, interpret, worker, block)

    if not interpret:
        # What is in front must have ended; what comes behind may make ready.
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

    roles = _roles(tiles)
    start = 512 // len(roles) // 8 * 8  # of the 65,536 that 128 threads of each share
    for index, role in enumerate(roles):

        @pl.when(thread == index)
        def _(role=role):
            action = "increase" if role.registers >= start else "decrease"
            plgpu.set_max_registers(role.registers, action=action)
            role.run(stand)


class _Role(NamedTuple):
    """What a warpgroup does, and with how many registers a thread."""

    name: str
    registers: int
    run: Callable[[Block], None]


def _roles(tiles: MosaicTiles) -> list[_Role]:
    """Of each warpgroup.

    One thread of each may together have as many registers as the device has for 128 threads.
    """
    ring = STRIPES if tiles.few_rows else HALVES
    if tiles.order == "line":
        values = [_Role(f"values {w}", 168, functools.partial(sum_values, w=w)) for w in (0, 1)]
        consumers = [_Role("scores", 128, score), *values]
    else:
        names = {"twins": "twin", "turns": "turn", "rows": "rows", "seesaw": "consumer"}
        name, run = names[tiles.order], consume_alone if tiles.few_rows else consume
        registers = REGISTERS[tiles.order] if tiles.ahead else 232
        consumers = [_Role(f"{name} {w}", registers, functools.partial(run, w=w)) for w in (0, 1)]
    if tiles.ahead:
        left = (512 - 2 * consumers[0].registers) // CONVERTERS // 8 * 8
        run = functools.partial(convert, ring=ring, ahead=tiles.ahead)
        converters = [
            _Role(f"converter {part}", left, functools.partial(run, part=part))
            for part in range(CONVERTERS)
        ]
        return [*consumers, *converters]
    run = functools.partial(produce, ring=ring)
    return [*consumers, _Role("producer", 40, run)]


def role_names(tiles: MosaicTiles) -> tuple[str, ...]:
    """What the warpgroups of a block are called, in the order of a profile's threads."""
    return tuple(role.name for role in _roles(tiles))


# Jitted, so that a program with many layers lowers the kernel, a second's work, once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "workers",
        "slots",
        "rows",
        "heads",
        "tokens",
        "tiles",
        "sparse",
        "interpret",
        "profile",
    ),
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
    sparse: bool = False,
    interpret: bool,
    profile: str = "",
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
):
    """(out, lse, part, part_lse): results of whole units, and of the parts of split ones.

    rows: of a request, padded to a multiple of 8, or, if more than 64, of `cluster` blocks'.
    work: `workers` rows of (the first of a worker's segments, the last + 1, the first one's row of
    Work.segments), so that a worker can start after one load, then a row for each segment, the same
    with two numbers that mean nothing.
    sparse: pages are of one token, and from `seen` on an id outside the pool stands for no key;
    needs rope columns, and keys that come through registers.
    kv_scales: of a float8_e4m3fn cache, for each slot and 128 columns, or one; None is 1.
    profile: a folder for a trace of what each warpgroup does in a launch, in its first tiles.
    """
    all_rows, latent = q_nope.shape
    rope = q_pe.shape[-1]
    dtype = q_nope.dtype
    cluster = {"cluster": (tiles.cluster,), "cluster_names": (CLUSTER,)}
    packed = ckv_cache.dtype == FP8 and not tiles.ahead
    factors, slot_scales, cache_scale, groups = (), (), 1.0, 0
    if kv_scales is not None and kv_scales.ndim > 0:
        groups = kv_scales.shape[-1]
        slot_scales = (kv_scales.reshape((kv_scales.shape[0], -1) if packed else -1),)
    elif kv_scales is not None:
        cache_scale = kv_scales
    if packed:
        q_nope, q_pe, factor = pack_queries(
            q_nope, q_pe, sm_scale, rope_packed=kpe_cache.dtype == FP8
        )
        factors = (factor,)
    with_rope = (q_pe,) if rope else ()
    args = (q_nope, *with_rope, ckv_cache, *((kpe_cache,) if rope else ()))
    numbers = jnp.stack([sm_scale, jnp.asarray(cache_scale, jnp.float32)])
    held = min(rows, ROWS)
    slot_rows = held if tiles.few_rows else ROWS * tiles.cluster
    run = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            rows=held,
            heads=heads,
            tokens=tokens,
            rope=rope > 0,
            sparse=sparse,
            slot_scales=bool(slot_scales),
            packed=packed,
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
        **(cluster if tiles.cluster > 1 else {}),
        num_threads=len(_roles(tiles)),
        thread_name=THREAD,
        scratch_types=scratch(
            tiles,
            rows=held,
            latent=latent,
            rope=rope > 0,
            sparse=sparse,
            boxes=CONVERTERS if tiles.ahead else max(1, KEYS // ckv_cache.shape[1]),
            dtype=dtype,
            packed=kpe_cache.dtype if packed else None,
            groups=groups if packed else 0,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # All that needs one is synchronised by hand.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            profile_space=PROFILED if profile else 0,
            profile_dir=profile,
            profile_bounds_check=bool(profile),
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        kernel_name="mla_paged_attention_mosaic",
    )
    return run(*args, page_ids, numbers, work, *factors, *slot_scales)
