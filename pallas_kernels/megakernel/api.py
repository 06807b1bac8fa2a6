"""The one entry of decode attention by a schedule."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.checks import FLOATS
from pallas_kernels.megakernel.program import planned_lengths, read_program
from pallas_kernels.megakernel.reference import run_reference
from pallas_kernels.megakernel.triton import run_triton
from pallas_kernels.schedule import Schedule

ROPE, LATENT, PAGE = 64, 512, 256

# Fastest first.
BACKENDS = (
    Backend(name="triton", run=run_triton, unfit=needs_gpu),
    Backend(name="reference", run=lambda program, *args, interpret: run_reference(program, *args)),
)


def _check_arrays(schedule: Schedule, arrays: dict[str, Array], table: Array) -> None:
    batch, tokens, heads = schedule.batch, schedule.new_tokens, schedule.num_heads
    pages = arrays["v"].shape[0]
    expected = {
        "q_rot": ((batch, tokens, heads, ROPE), "[batch, new_tokens, heads, 64] of the schedule"),
        "q_v": ((batch, tokens, heads, LATENT), "[batch, new_tokens, heads, 512] of the schedule"),
        "k_rot": ((pages, PAGE, ROPE), "[pages, 256, 64], v's pages"),
        "v": ((pages, PAGE, LATENT), "[pages, 256, 512]"),
    }
    for name, (shape, where) in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name}: got shape {arrays[name].shape}, expected {shape}, {where}")
    if pages == 0:
        raise ValueError("v: got no page, expected at least one")
    dtype = arrays["q_v"].dtype
    if str(dtype) not in FLOATS:
        raise TypeError(f"q_v: got dtype {dtype}, expected one of {', '.join(FLOATS)}")
    for name, array in arrays.items():
        if array.dtype != dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {dtype}, q_v's")
    if table.ndim != 2 or table.shape[0] != batch or table.shape[1] == 0:
        raise ValueError(f"table: got shape {table.shape}, expected [{batch}, max_pages]")


def _check_ints(schedule: Schedule, table: Array, lengths: Array | None, pages: int) -> None:
    """Dtypes; and values, where they are concrete."""
    named = {"table": table} if lengths is None else {"table": table, "lengths": lengths}
    for name, array in named.items():
        if array.dtype != jnp.int32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
    if lengths is not None and lengths.shape != (schedule.batch,):
        raise ValueError(f"lengths: got shape {lengths.shape}, expected ({schedule.batch},)")
    if not isinstance(schedule.instructions, np.ndarray):
        return
    planned = used = schedule.lengths
    if isinstance(lengths, Tracer):
        return
    if lengths is not None:
        used = np.asarray(lengths)
        if (used < 0).any() or (used > planned).any():
            bad = int(np.argmax((used < 0) | (used > planned)))
            raise ValueError(
                f"lengths: got {used[bad]} for sequence {bad}, expected 0 to {planned[bad]}, for "
                "which the schedule was made: make one for longer sequences"
            )
    needed = -(-used // PAGE)
    if needed.max() > table.shape[1]:
        raise ValueError(
            f"table: got {table.shape[1]} pages a sequence, expected {needed.max()} for "
            f"{used.max()} keys"
        )
    if isinstance(table, Tracer):
        return
    ids = np.asarray(table)[np.arange(table.shape[1]) < needed[:, None]]
    if ids.size and (ids.min() < 0 or ids.max() >= pages):
        raise ValueError(f"table: got pages {ids.min()} to {ids.max()}, expected 0 to {pages - 1}")


def decode_by_schedule(
    schedule: Schedule,
    q_rot: Float[Array, "batch tokens heads 64"],
    q_v: Float[Array, "batch tokens heads 512"],
    k_rot: Float[Array, "pages 256 64"],
    v: Float[Array, "pages 256 512"],
    table: Int[Array, "batch max_pages"],
    scale: float | Float[Array, ""],
    *,
    lengths: Int[Array, " batch"] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch tokens heads 512"]:
    """Attention of each sequence's last tokens over its pages, as the schedule's table says.

    Sizes and errors as in `mla_jax.megakernel.mla_decode`.
    """
    arrays = {"q_rot": q_rot, "q_v": q_v, "k_rot": k_rot, "v": v}
    _check_arrays(schedule, arrays, table)
    _check_ints(schedule, table, lengths, v.shape[0])
    chosen = choose("mla_decode", BACKENDS, schedule, backend)
    scale = jnp.asarray(scale, jnp.float32)
    program = read_program(schedule, lengths)
    out = chosen.run(program, *arrays.values(), table, scale, interpret=interpret)
    if lengths is None:
        return out
    # Keys that no instruction reads would go missing without a word.
    outgrown = lengths > planned_lengths(schedule)
    return jnp.where(outgrown[:, None, None, None], jnp.asarray(jnp.nan, out.dtype), out)
