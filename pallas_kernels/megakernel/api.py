"""The one entry of decode attention by a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.checks import FLOATS
from pallas_kernels.device import current_device
from pallas_kernels.megakernel.persistent import run_persistent
from pallas_kernels.megakernel.program import planned_lengths, read_program
from pallas_kernels.megakernel.reference import run_reference
from pallas_kernels.megakernel.signals import signal_words
from pallas_kernels.megakernel.triton import run_triton
from pallas_kernels.schedule import Schedule

ROPE, LATENT, PAGE = 64, 512, 256

QUEUES = ("processors", "global")


class Call(NamedTuple):
    """What decides whether a backend can run a call."""

    processors: int
    queue: str
    interpret: bool


def _crowded(call: Call) -> str | None:
    """Why a processor might wait for one that cannot run beside it; None if none might."""
    if call.queue == "global":
        return None
    advice = 'use queue="global"'
    if call.interpret and call.processors > 1:
        return f"the interpreter runs processors one after the other, which wait: {advice}"
    cores = current_device().num_cores
    if cores is not None and call.processors > cores:
        return (
            f"the schedule has {call.processors} processors, which must run at a time, and the "
            f"device {cores} cores: {advice}"
        )
    return None


def _queueless(call: Call) -> str | None:
    if call.queue == "global":
        return "it runs a level of reductions after the other and has no queue"
    return None


def _by_level(run: Callable[..., Array]) -> Callable[..., tuple[Array, Array | None]]:
    """A backend of one launch from one that takes a program, and knows no signals or queues."""

    def run_levels(
        schedule: Schedule,
        lengths: Array | None,
        signals: Array | None,
        *arrays: Array,
        queue: str,
        **options: Any,
    ) -> tuple[Array, Array | None]:
        out = run(read_program(schedule, lengths), *arrays, **options)
        if lengths is None:
            return out, signals
        # Keys that no instruction reads would go missing without a word.
        outgrown = lengths > planned_lengths(schedule)
        out = jnp.where(outgrown[:, None, None, None], jnp.asarray(jnp.nan, out.dtype), out)
        return out, signals

    return run_levels


# Fastest first.
BACKENDS = (
    Backend(name="megakernel", run=run_persistent, unsupported=_crowded, unfit=needs_gpu),
    Backend(name="triton", run=_by_level(run_triton), unsupported=_queueless, unfit=needs_gpu),
    Backend(
        name="reference",
        run=_by_level(lambda program, *args, interpret: run_reference(program, *args)),
        unsupported=_queueless,
    ),
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


def _check_signals(schedule: Schedule, signals: Array | None) -> None:
    if signals is None:
        return
    words = signal_words(schedule)
    if signals.shape != (words,) or signals.dtype != jnp.int32:
        raise ValueError(
            f"signals: got {signals.dtype}{list(signals.shape)}, expected int32[{words}], "
            "make_signals of this schedule"
        )


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
    signals: Int[Array, " words"] | None = None,
    queue: str = "processors",
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens heads 512"], Int[Array, " words"] | None]:
    """(attention of each sequence's last tokens over its pages, signals for the next launch).

    Sizes and errors as in `mla_jax.megakernel.mla_decode`. signals: those of `make_signals`, or of
    the launch before; backends other than the one launch give them back as they are.
    """
    arrays = {"q_rot": q_rot, "q_v": q_v, "k_rot": k_rot, "v": v}
    _check_arrays(schedule, arrays, table)
    _check_ints(schedule, table, lengths, v.shape[0])
    _check_signals(schedule, signals)
    if queue not in QUEUES:
        raise ValueError(f"queue: got {queue!r}, expected one of {', '.join(QUEUES)}")
    call = Call(schedule.instructions.shape[0], queue, interpret)
    chosen = choose("mla_decode", BACKENDS, call, backend)
    scale = jnp.asarray(scale, jnp.float32)
    return chosen.run(
        *(schedule, lengths, signals, *arrays.values(), table, scale),
        queue=queue,
        interpret=interpret,
    )
