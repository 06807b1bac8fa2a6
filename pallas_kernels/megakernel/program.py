"""An instruction table as arrays by field, on the device: the table itself may be traced."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.schedule import Schedule
from pallas_kernels.schedule.arrays import positions, sorted_by
from pallas_kernels.schedule.instructions.words import (
    FIRST_DEPENDENCY,
    MOST_DEPENDENCIES,
    PARTIAL,
    QUERY_TOKENS,
    REDUCTION,
    WORDS,
)


class Partials(NamedTuple):
    """PARTIAL instructions, then no-ops, which have busy false and no keys.

    row: where in scratch the result goes; below 0 for one that is the output itself.
    """

    busy: Bool[Array, " partials"]
    row: Int[Array, " partials"]
    batch: Int[Array, " partials"]
    q_seq: Int[Array, " partials"]
    start: Int[Array, " partials"]
    end: Int[Array, " partials"]
    length: Int[Array, " partials"]


class Reductions(NamedTuple):
    """REDUCTION instructions, then no-ops, which have level 0 and no inputs.

    level: those of level n need results of levels below n alone, of which partials have 0.
    """

    row: Int[Array, " reductions"]
    batch: Int[Array, " reductions"]
    token: Int[Array, " reductions"]
    inputs: Int[Array, " reductions"]
    dependencies: Int[Array, "reductions 27"]
    level: Int[Array, " reductions"]


class Program(NamedTuple):
    """A schedule's instructions; scratch has so many rows, and reductions so many levels."""

    partials: Partials
    reductions: Reductions
    scratch_rows: int
    depth: int


def _levels(row: Array, inputs: Array, dependencies: Array, scratch_rows: int, depth: int) -> Array:
    """Each reduction's level, from the rows that it reads and the one that it writes, or -1."""
    listed = jnp.arange(MOST_DEPENDENCIES) < inputs[:, None]
    to = jnp.where(row >= 0, row, scratch_rows)
    level = jnp.zeros_like(row)
    for _ in range(depth):
        of_row = jnp.zeros(scratch_rows, row.dtype).at[to].set(level, mode="drop")
        below = jnp.max(jnp.where(listed, of_row[dependencies], 0), axis=1)
        level = jnp.where(inputs > 0, below + 1, 0)
    return level


def read_program(schedule: Schedule, lengths: Int[Array, " batch"] | None) -> Program:
    """The fields of `schedule`'s table; `lengths` replaces its own, and ends what goes beyond."""
    assert schedule.bounds is not None
    num_partials, num_reductions, scratch_rows, depth = schedule.bounds
    words = jnp.asarray(schedule.instructions).reshape(-1, WORDS)
    op = words[:, 0]
    padded = jnp.concatenate([words, jnp.zeros((1, WORDS), words.dtype)])

    partial = padded[positions(op == PARTIAL, num_partials)]
    batch = jnp.clip(partial[:, 4], 0, schedule.batch - 1)
    busy, end, length = partial[:, 0] == PARTIAL, partial[:, 7], partial[:, 8]
    if lengths is not None:
        length = jnp.where(busy, jnp.maximum(lengths, 0)[batch], 0)
        end = jnp.minimum(end, length)
    partials = Partials(
        busy=busy,
        row=-partial[:, 2] - 1,
        batch=batch,
        q_seq=partial[:, 5],
        start=partial[:, 6],
        end=jnp.maximum(end, partial[:, 6]),
        length=length,
    )

    reduction = padded[positions(op == REDUCTION, num_reductions)]
    busy = reduction[:, 0] == REDUCTION
    row, inputs = -reduction[:, 3] - 1, jnp.where(busy, reduction[:, 2] + 1, 0)
    dependencies = jnp.clip(reduction[:, FIRST_DEPENDENCY:], 0, scratch_rows - 1)
    level = _levels(row, inputs, dependencies, scratch_rows, depth)
    reductions = Reductions(
        row=row,
        batch=reduction[:, 3],
        token=reduction[:, 4],
        inputs=inputs,
        dependencies=dependencies,
        level=level,
    )
    return Program(partials, reductions, scratch_rows, depth)


def planned_lengths(schedule: Schedule) -> Int[Array, " batch"]:
    """The keys of each sequence that the table covers."""
    words = jnp.asarray(schedule.instructions).reshape(-1, WORDS)
    to = jnp.where(words[:, 0] == PARTIAL, words[:, 4], schedule.batch)
    return jnp.zeros(schedule.batch, jnp.int32).at[to].max(words[:, 8], mode="drop")


def token_groups(new_tokens: int) -> tuple[int, int]:
    """(groups, query tokens of each) into which partials cut a sequence's query tokens."""
    size = min(new_tokens, QUERY_TOKENS)
    return -(-new_tokens // size), size


def global_order(schedule: Schedule) -> Int[Array, " instructions"]:
    """The table's rows as one queue, in which no instruction depends on a later one.

    Partials, the longest first, then reductions by level, then no-ops.
    """
    assert schedule.bounds is not None
    words = jnp.asarray(schedule.instructions).reshape(-1, WORDS)
    op = words[:, 0]
    last = jnp.iinfo(jnp.int32).max
    key = jnp.where(op == PARTIAL, words[:, 6] - words[:, 7], last)
    level = read_program(schedule, None).reductions.level
    row = positions(op == REDUCTION, schedule.bounds[1])
    key = key.at[row].set(jnp.where(level > 0, level, last), mode="drop")
    [order] = sorted_by(key, (jnp.arange(len(op), dtype=jnp.int32),))
    return order
