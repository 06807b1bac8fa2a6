"""The merge as one Pallas kernel, lowered through Triton: XLA would make four of it."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Float

COLUMNS = 128
NEG_INF = float("-inf")


def _merge_kernel(out_ref, lse_ref, merged_ref, merged_lse_ref, *, parts: int):
    """out_ref [parts, rows, C] and lse_ref [parts, rows], in device memory; one row a block."""
    row, block = pl.program_id(0), pl.program_id(1)
    part = jnp.arange(pl.next_power_of_2(parts))
    column = block * merged_ref.shape[0] + jnp.arange(merged_ref.shape[0])
    present = part < parts
    lse = plgpu.load(lse_ref.at[part, row], mask=present, other=NEG_INF)
    out = plgpu.load(
        out_ref.at[part[:, None], row, column[None, :]], mask=present[:, None], other=0
    )
    top = jnp.max(lse)
    shift = jnp.where(top == NEG_INF, 0.0, top)
    weights = jnp.exp2(lse - shift)
    total = jnp.sum(weights)
    safe = jnp.where(total == 0.0, 1.0, total)
    merged_ref[...] = (jnp.sum(out * weights[:, None], axis=0) / safe).astype(merged_ref.dtype)

    @pl.when(block == 0)
    def _():
        merged_lse_ref[row] = jnp.where(total == 0.0, NEG_INF, jnp.log2(safe) + shift)


def merge_partials_triton(
    out: Float[Array, "parts rows latent"],
    lse: Float[Array, "parts rows"],
    dtype: DTypeLike,
    *,
    interpret: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """`merge_partials`, the result rounded to `dtype`; latent must be a power of two."""
    parts, rows, latent = out.shape
    columns = min(COLUMNS, latent)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *refs: _merge_kernel(*refs, parts=parts),
        grid=(rows, latent // columns),
        in_specs=[whole, whole],
        out_specs=[pl.BlockSpec((None, columns), lambda r, c: (r, c)), whole],
        out_shape=[
            jax.ShapeDtypeStruct((rows, latent), dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_merge",
    )(out, lse)
