"""Putting the parts of split units together: the second launch of paged attention."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import current_device
from pallas_kernels.exponential import NEG_INF, exp2
from pallas_kernels.paged_attention.tiles import DEFAULT_CORES

BLOCKS_PER_CORE = 16
"""As many blocks of 4 warps as a core can hold."""
MANY_ROWS = 2048
"""So many rows that one block a row fills the device."""


def _kernel(
    part_ref,  # [slots * slot_rows, C]
    part_lse_ref,  # [slots * slot_rows]
    merges_ref,  # [merges, 5]
    splits_ref,  # [1]
    *refs,
    parts: int,
    columns: int,
    slot_rows: int,
    interpret: bool,
):
    """Every so many-th of all rows' stretches of columns."""
    latent = part_ref.shape[1]
    per_row = latent // columns
    items = splits_ref[0] * (slot_rows * per_row)
    first, stride = pl.program_id(0), pl.num_programs(0)

    def body(i, _):
        item = first + i * stride
        row, block = item // per_row, item % per_row
        _merge_row(
            *(row // slot_rows, row % slot_rows, block),
            *(part_ref, part_lse_ref, merges_ref, *refs[-2:]),
            parts=parts,
            columns=columns,
            slot_rows=slot_rows,
            interpret=interpret,
        )

    lax.fori_loop(0, pl.cdiv(jnp.maximum(items - first, 0), stride), body, None)


def _merge_row(
    merge,
    row,
    block,
    part_ref,
    part_lse_ref,
    merges_ref,
    out_ref,
    lse_ref,
    *,
    parts: int,
    columns: int,
    slot_rows: int,
    interpret: bool,
):
    """One row and some columns of one split unit, `parts` parts at a time."""
    count, slot, base, offset, rows = (merges_ref[merge, i] for i in range(5))

    @pl.when(offset + row < rows)
    def _():
        column = block * columns + jnp.arange(columns)

        def step(i, carry):
            acc, m, l = carry
            part = i * parts + jnp.arange(parts)
            present = part < count
            at = (slot + part) * slot_rows + row
            lse = plgpu.load(part_lse_ref.at[at], mask=present, other=NEG_INF)
            out = plgpu.load(
                part_ref.at[at[:, None], column[None, :]], mask=present[:, None], other=0
            )
            new_m = jnp.maximum(m, jnp.max(lse))
            shift = jnp.where(new_m == NEG_INF, 0.0, new_m)
            weights, keep = exp2(lse - shift, interpret), jnp.exp2(m - shift)
            acc = acc * keep + jnp.sum(out * weights[:, None], axis=0)
            return acc, new_m, l * keep + jnp.sum(weights)

        carry = (jnp.zeros(columns, jnp.float32), jnp.float32(NEG_INF), jnp.float32(0))
        acc, m, l = lax.fori_loop(0, pl.cdiv(count, parts), step, carry)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        at = base + offset + row
        out_ref[at, pl.ds(block * columns, columns)] = (acc / l).astype(out_ref.dtype)

        @pl.when(block == 0)
        def _():
            lse_ref[at] = jnp.where(empty, NEG_INF, m + jnp.log2(l))


def merge_parts(
    out: Float[Array, "rows latent"],
    lse: Float[Array, " rows"],
    part: Float[Array, "slots latent"],
    part_lse: Float[Array, " slots"],
    merges: Int[Array, "merges 5"],
    splits: Int[Array, "1"],
    *,
    slot_rows: int,
    deterministic: bool,
    interpret: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """`out` and `lse`, in place, with the rows of every split unit merged from its parts.

    merges, splits: as in Work; with no unit split, the launch is all that this costs.
    The order of a sum depends on how many parts are taken at a time: always as many, where a
    result must not depend on the size of the batch.
    """
    latent = out.shape[1]
    few = deterministic or out.shape[0] < MANY_ROWS
    parts, columns = (32, min(128, latent)) if few else (4, latent)
    cores = current_device().num_cores or DEFAULT_CORES
    items = merges.shape[0] * slot_rows * (latent // columns)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _kernel, parts=parts, columns=columns, slot_rows=slot_rows, interpret=interpret
        ),
        grid=(min(items, BLOCKS_PER_CORE * cores),),
        in_specs=[whole] * 6,
        out_specs=[whole] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct(lse.shape, lse.dtype),
        ],
        input_output_aliases={4: 0, 5: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_paged_merge",
    )(part, part_lse, merges, splits, out, lse)
