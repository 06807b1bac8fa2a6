"""Putting the parts of split units together: the second launch of paged attention."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.exponential import NEG_INF, exp2

MANY_ROWS = 2048
"""So many rows that one block a row fills the device."""


def _kernel(
    part_ref,  # [slots * slot_rows, C]
    part_lse_ref,  # [slots * slot_rows]
    merges_ref,  # [merges, 5]
    *refs,
    parts: int,
    columns: int,
    slot_rows: int,
    interpret: bool,
):
    """One row and some columns of one split unit, `parts` parts at a time."""
    out_ref, lse_ref = refs[-2:]
    merge, row, block = (pl.program_id(axis) for axis in range(3))
    count, slot, base, offset, rows = (merges_ref[merge, i] for i in range(5))

    @pl.when((count > 1) & (offset + row < rows))
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
    *,
    slot_rows: int,
    deterministic: bool,
    interpret: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """`out` and `lse`, in place, with the rows of every split unit merged from its parts.

    The order of a sum depends on how many parts are taken at a time: always as many, where a
    result must not depend on the size of the batch.
    """
    latent = out.shape[1]
    few = deterministic or out.shape[0] < MANY_ROWS
    parts, columns = (32, min(128, latent)) if few else (4, latent)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _kernel, parts=parts, columns=columns, slot_rows=slot_rows, interpret=interpret
        ),
        grid=(merges.shape[0], slot_rows, latent // columns),
        in_specs=[whole] * 5,
        out_specs=[whole] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct(lse.shape, lse.dtype),
        ],
        input_output_aliases={3: 0, 4: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_paged_merge",
    )(part, part_lse, merges, out, lse)
