"""Putting the parts of split units together behind the Mosaic GPU kernel.

The same as merge.py, in the dialect in which a launch may begin before the one in front of it has
ended: its blocks stand ready, with their rows of the plan, when the last part is written.
"""

# Older versions of jax, which `unsupported` refuses, have less of this dialect.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import current_device
from pallas_kernels.exponential import NEG_INF
from pallas_kernels.paged_attention.mosaic_block import GRID, THREAD
from pallas_kernels.paged_attention.tiles import DEFAULT_CORES

WARPGROUPS = 4
"""Of a block, each with rows of its own. A block takes a core's place in turn with those of the
launch in front, whose registers leave no room beside them: few large ones are there sooner.
"""
FEWEST_COLUMNS = 128
MANY_ROWS = 512
"""So many rows that one block a row fills the device."""
FEW_PARTS, MANY_PARTS = 4, 16
"""How many parts are loaded at a time where there are enough rows to fill the device, or not."""


def _kernel(
    part,  # [slots * slot_rows, C]
    part_lse,  # [slots * slot_rows]
    merges,  # [merges, 5]
    splits,  # [1]
    out,
    lse,
    *,
    parts: int,
    columns: int,
    slot_rows: int,
):
    """Every so many-th of all rows' stretches of columns."""
    per_row = part.shape[1] // columns
    stride = lax.axis_size(GRID) * WARPGROUPS
    first = lax.axis_index(GRID) * WARPGROUPS + lax.axis_index(THREAD)
    items = splits[0] * (slot_rows * per_row)

    def merge_of(item):
        row = lax.div(item, jnp.int32(per_row))
        merge = jnp.minimum(lax.div(row, jnp.int32(slot_rows)), merges.shape[0] - 1)
        fields = tuple(merges[merge, i] for i in range(5))
        return (*fields, lax.rem(row, jnp.int32(slot_rows)))

    def body(i, ahead):
        item = first + i * stride
        _merge_row(
            *ahead,
            lax.rem(item, jnp.int32(per_row)),
            *(part, part_lse, out, lse),
            parts=parts,
            columns=columns,
            slot_rows=slot_rows,
        )
        return merge_of(item + stride)

    # The plan was there before the launch in front began; its results come with its end.
    ahead = merge_of(first)
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()
    rounds = lax.div(jnp.maximum(items - first, 0) + (stride - 1), stride)
    lax.fori_loop(0, rounds, body, ahead)


def _merge_row(
    count,
    slot,
    base,
    offset,
    rows,
    row,
    block,
    part,
    part_lse,
    out,
    lse,
    *,
    parts: int,
    columns: int,
    slot_rows: int,
):
    """One row and some columns of one split unit, `parts` parts at a time."""
    column = pl.ds(pl.multiple_of(block * columns, columns), columns)

    @pl.when(offset + row < rows)
    def _():
        def step(i, carry):
            acc, m, l = carry
            places = [i * parts + p for p in range(parts)]
            at = [(slot + jnp.minimum(place, count - 1)) * slot_rows + row for place in places]
            found = [part[a, column] for a in at]
            own = [
                jnp.where(place < count, part_lse[a], NEG_INF)
                for place, a in zip(places, at, strict=True)
            ]
            new_m = functools.reduce(jnp.maximum, own, m)
            shift = jnp.where(new_m == NEG_INF, 0.0, new_m)
            keep, weights = jnp.exp2(m - shift), [jnp.exp2(one - shift) for one in own]
            acc, l = acc * keep, l * keep
            for values, weight in zip(found, weights, strict=True):
                # An absent part is a present one's copy, and that of an empty one may be anything.
                acc, l = acc + values * weight, l + weight
            return acc, new_m, l

        zeros = jnp.zeros((columns,), jnp.float32)
        start = (zeros, jnp.float32(NEG_INF), jnp.float32(0))
        rounds = lax.div(count + (parts - 1), jnp.int32(parts))
        acc, m, l = lax.fori_loop(0, rounds, step, start)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        at = base + offset + row
        out[at, column] = (acc / l).astype(out.dtype)

        @pl.when(block == 0)
        def _():
            lse[at] = jnp.where(empty, NEG_INF, m + jnp.log2(l))


@functools.partial(jax.jit, static_argnames=("slot_rows", "deterministic"))
def merge_parts_mosaic(
    out: Float[Array, "rows latent"],
    lse: Float[Array, " rows"],
    part: Float[Array, "slots latent"],
    part_lse: Float[Array, " slots"],
    merges: Int[Array, "merges 5"],
    splits: Int[Array, "1"],
    *,
    slot_rows: int,
    deterministic: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """`merge_parts` for a launch behind `attend_pages_mosaic`."""
    latent = out.shape[1]
    rows = merges.shape[0] * slot_rows
    few = deterministic or rows < MANY_ROWS
    parts, columns = (MANY_PARTS, min(FEWEST_COLUMNS, latent)) if few else (FEW_PARTS, latent)
    cores = current_device().num_cores or DEFAULT_CORES
    items = rows * (latent // columns)
    merge = plgpu.kernel(
        functools.partial(_kernel, parts=parts, columns=columns, slot_rows=slot_rows),
        grid=(min(-(-items // WARPGROUPS), cores),),
        grid_names=(GRID,),
        num_threads=WARPGROUPS,
        thread_name=THREAD,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="mla_paged_merge_mosaic",
    )
    in_place = pl.run_state(lambda refs: merge(part, part_lse, merges, splits, *refs))
    return in_place((out, lse))
