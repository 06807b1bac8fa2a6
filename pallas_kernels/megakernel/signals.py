"""How the processors of one launch tell each other what is done: words in device memory.

A producer's results are in memory before its signal is (release), and a consumer that has seen the
signal reads them (acquire); barriers make that so for all threads of a block. The interpreter, with
one thread, lacks these operations and needs none. A signal is the number of the launch that gave
it, so that a launch finds no words to clear: it hands them to the next one as they are. The block
that ends last counts the launch.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.schedule import Schedule

LAUNCHES, ENDED, TICKETS, LATE = range(4)
"""Launches so far; of the present one, the blocks that ended and the instructions that were taken;
and 1 + the uid of a reduction that waited in vain, in this launch or an earlier one."""
FIRST = 32
"""Where the signals of uids begin: behind a cache line."""
PATIENCE = 1 << 20
"""Polls, of about a microsecond each, after which a reduction gives up."""


def signal_words(schedule: Schedule) -> int:
    """How many words launches of `schedule` need."""
    assert schedule.bounds is not None
    return FIRST + schedule.bounds[2]


def make_signals(schedule: Schedule) -> Int[Array, " words"]:
    """Fresh words for launches of `schedule`, and of schedules of like size.

    >>> from pallas_kernels.schedule import schedule
    >>> make_signals(schedule([300], new_tokens=1, num_processors=2)).shape
    (96,)
    """
    return jnp.zeros(signal_words(schedule), jnp.int32)


def check_signals(signals: Int[Array, " words"]) -> None:
    """Raise RuntimeError if a reduction waited in vain; waits for the launches so far.

    Its output, and what was made of it, is NaN; one check after many
    launches finds the last of them. Errors: TypeError inside jit, where there are no values.

    >>> check_signals(jnp.zeros(96, jnp.int32))
    """
    if isinstance(signals, Tracer):
        raise TypeError("signals: got a traced array, expected a concrete one: check outside jit")
    if late := int(np.asarray(signals)[LATE]):
        raise RuntimeError(
            f"signals: uid {late - 1} waited in vain for a result, after {PATIENCE} polls: its "
            "schedule has lost a producer, or not all of its processors ran at a time"
        )


def publish(signals_ref, uid, launch, interpret: bool) -> None:
    """Say that all of this block's stores so far, the result of `uid`, can be read."""
    if interpret:
        signals_ref[FIRST + uid] = launch
    else:
        plgpu.debug_barrier()
        plgpu.atomic_xchg(signals_ref, FIRST + uid, launch)


def wait_for(signals_ref, uids, launch, patience: int, interpret: bool):
    """Whether all `uids` have been published, or are within `patience` polls."""
    number = uids.shape[0]

    def poll(state):
        _, polls = state
        at = FIRST + uids
        if interpret:
            seen = signals_ref[at]
        else:
            seen = plgpu.atomic_or(signals_ref, (at,), jnp.zeros_like(at))
        return jnp.sum((seen == launch).astype(jnp.int32), dtype=jnp.int32), polls + 1

    def lacking(state):
        there, polls = state
        return (there < number) & (polls < patience)

    there, _ = lax.while_loop(lacking, poll, (jnp.int32(0), jnp.int32(0)))
    if not interpret:
        plgpu.debug_barrier()
    return there == number


def _count(signals_ref, word: int, interpret: bool):
    """The count in this word, which then is one higher; no two blocks get the same."""
    if interpret:
        count = signals_ref[word]
        signals_ref[word] = count + 1
        return count
    return plgpu.atomic_add(signals_ref, word, jnp.int32(1))


def take_ticket(signals_ref, interpret: bool):
    """The next number of this launch, from 0."""
    return _count(signals_ref, TICKETS, interpret)


def end_block(signals_ref, launch, blocks, interpret: bool) -> None:
    """Count this block as ended; the last one of `blocks` makes the words ready for a launch."""
    ended = _count(signals_ref, ENDED, interpret)

    @pl.when(ended == blocks - 1)
    def _():
        signals_ref[LAUNCHES] = launch
        signals_ref[ENDED] = jnp.int32(0)
        signals_ref[TICKETS] = jnp.int32(0)
