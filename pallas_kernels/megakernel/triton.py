"""The table executed by Pallas Triton kernels: a launch for partials, one for each level above.

The launches stand in for the waiting of one persistent kernel: a level starts when those below it
are done. Partials run on the kernel of paged attention, whose segments they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.exponential import NEG_INF, exp2
from pallas_kernels.megakernel.program import Partials, Program, Reductions, token_groups
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_attention.triton import attend_segments
from pallas_kernels.paged_attention.units import Segment
from pallas_kernels.schedule.instructions.quality import STEP

INPUTS = 32
"""A dependency list, padded to a power of two: a block loads all inputs at once."""
COLUMNS = 128
"""Latent columns of one block of a reduction."""


def _tiles(rows: int, dtype: str) -> PagedTiles:
    """One tile for all rows of a partial; in float32 its accumulator would not fit."""
    rows = 16 if dtype == "float32" else max(16, 1 << (rows - 1).bit_length())
    return PagedTiles(rows=rows, keys=STEP, num_warps=4, num_stages=2, blocks_per_core=1)


def _segments(partials: Partials, tokens: int, heads: int, max_pages: int) -> Array:
    """Partials as the paged attention kernel reads them."""
    _, size = token_groups(tokens)
    rows = jnp.minimum(size, tokens - partials.q_seq) * heads
    segment = Segment(
        begin=partials.start // STEP,
        end=(partials.end + STEP - 1) // STEP,
        slot=jnp.maximum(partials.row, -1),
        base=(partials.batch * tokens + partials.q_seq) * heads,
        offset=jnp.zeros_like(rows),
        rows=rows,
        owned=jnp.where(partials.busy, rows, 0),
        first_id=partials.batch * max_pages,
        length=partials.end,
        seen=partials.length - tokens + partials.q_seq + 1,
    )
    return jnp.stack(segment, axis=1)


def _reduce_kernel(
    fields_ref,  # [reductions, 5]: level, inputs, scratch row, output row, token in its group
    dependencies_ref,  # [reductions, INPUTS]
    part_ref,  # [scratch rows * slot_rows, C]
    part_lse_ref,  # [scratch rows * slot_rows]
    out_ref,  # [rows, C], not read
    *refs,
    level: int,
    heads: int,
    slot_rows: int,
    interpret: bool,
):
    """One reduction, head and block of columns."""
    del out_ref
    to_part_ref, to_part_lse_ref, to_out_ref = refs
    index, head, block = (pl.program_id(axis) for axis in range(3))
    its_level, inputs, scratch_row, out_row, slot = (fields_ref[index, i] for i in range(5))

    @pl.when(its_level == level)
    def _():
        lane, column = jnp.arange(INPUTS), block * COLUMNS + jnp.arange(COLUMNS)
        present = lane < inputs
        at = dependencies_ref[index, :] * slot_rows + slot * heads + head
        lse = plgpu.load(part_lse_ref.at[at], mask=present, other=NEG_INF)
        out = plgpu.load(part_ref.at[at[:, None], column[None, :]], mask=present[:, None], other=0)
        m = jnp.max(lse)
        # Inputs that have all seen no key give 0 and -inf, not NaN.
        weights = exp2(lse - jnp.where(m == NEG_INF, 0.0, m), interpret)
        total = jnp.sum(weights)
        merged = jnp.sum(out * weights[:, None], axis=0) / jnp.where(total == 0.0, 1.0, total)

        @pl.when(scratch_row < 0)
        def _():
            to = to_out_ref.at[out_row * heads + head, pl.ds(block * COLUMNS, COLUMNS)]
            to[...] = merged.astype(to_out_ref.dtype)

        @pl.when(scratch_row >= 0)
        def _():
            row = scratch_row * slot_rows + slot * heads + head
            to_part_ref[row, pl.ds(block * COLUMNS, COLUMNS)] = merged

            @pl.when(block == 0)
            def _():
                to_part_lse_ref[row] = jnp.where(total == 0.0, NEG_INF, m + jnp.log2(total))


def _reduce_level(
    arrays: tuple[Array, Array, Array],
    fields: Int[Array, "reductions 5"],
    dependencies: Int[Array, "reductions 32"],
    *,
    level: int,
    heads: int,
    slot_rows: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """(scratch, its lse, out), in place, after the reductions of one level."""
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _reduce_kernel, level=level, heads=heads, slot_rows=slot_rows, interpret=interpret
        ),
        grid=(fields.shape[0], heads, arrays[0].shape[1] // COLUMNS),
        in_specs=[whole] * 5,
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        input_output_aliases={2: 0, 3: 1, 4: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_megakernel_reduction",
    )(fields, dependencies, *arrays)


def _reduction_arrays(reductions: Reductions, tokens: int) -> tuple[Array, Array]:
    """What `_reduce_kernel` reads."""
    _, size = token_groups(tokens)
    fields = (
        *(reductions.level, reductions.inputs, reductions.row),
        *(reductions.batch * tokens + reductions.token, reductions.token % size),
    )
    padding = INPUTS - reductions.dependencies.shape[1]
    return jnp.stack(fields, axis=1), jnp.pad(reductions.dependencies, ((0, 0), (0, padding)))


def run_triton(
    program: Program,
    q_rot: Float[Array, "batch tokens heads rope"],
    q_v: Float[Array, "batch tokens heads latent"],
    k_rot: Float[Array, "pages page rope"],
    v: Float[Array, "pages page latent"],
    table: Int[Array, "batch max_pages"],
    scale: Float[Array, ""],
    *,
    interpret: bool,
) -> Float[Array, "batch tokens heads latent"]:
    """The output of `program`, of q_v's dtype."""
    _, tokens, heads, latent = q_v.shape
    rows = token_groups(tokens)[1] * heads
    tiles = _tiles(rows, str(q_v.dtype))
    row_blocks = -(-rows // tiles.rows)
    out, _, part, part_lse = attend_segments(
        *(q_v.reshape(-1, latent), q_rot.reshape(-1, q_rot.shape[-1]), v, k_rot),
        *(table.ravel(), scale, _segments(program.partials, tokens, heads, table.shape[1])),
        slots=program.scratch_rows,
        heads=heads,
        row_blocks=row_blocks,
        tiles=tiles,
        interpret=interpret,
    )
    fields, dependencies = _reduction_arrays(program.reductions, tokens)
    arrays = part, part_lse, out
    for level in range(1, program.depth + 1):
        arrays = _reduce_level(
            arrays,
            fields,
            dependencies,
            level=level,
            heads=heads,
            slot_rows=row_blocks * tiles.rows,
            interpret=interpret,
        )
    return arrays[2].reshape(q_v.shape)
