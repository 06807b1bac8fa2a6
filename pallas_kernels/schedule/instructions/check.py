"""What every instruction table must satisfy; what does not is refused with one line."""

import numpy as np

from pallas_kernels.schedule.instructions.quality import STEP
from pallas_kernels.schedule.instructions.words import (
    MOST_DEPENDENCIES,
    PARTIAL,
    QUERY_TOKENS,
    WORDS,
    Listed,
)


def _refuse(bad: np.ndarray, uids: np.ndarray, problem: str) -> None:
    if bad.any():
        raise ValueError(f"instructions: uid {uids[np.argmax(bad)]} {problem}")


def _check_form(table: np.ndarray) -> Listed:
    if table.ndim != 3 or table.shape[2] != WORDS or 0 in table.shape:
        raise ValueError(
            f"instructions: got shape {table.shape}, expected [processors, longest, {WORDS}]"
        )
    if table.dtype != np.int32:
        raise TypeError(f"instructions: got dtype {table.dtype}, expected int32")
    op = table[..., 0]
    if op.min() < 0 or op.max() > 2:
        raise ValueError(f"instructions: got op {op.min()} to {op.max()}, expected 0, 1 or 2")
    listed = Listed.of(table)
    uids, counts = np.unique(listed.uid, return_counts=True)
    if len(uids) == 0:
        raise ValueError("instructions: got no-ops only, expected work")
    _refuse(uids < 0, uids, "is negative")
    _refuse(counts > 1, uids, f"stands {counts.max()} times, expected once")
    inputs, is_partial = listed.inputs, listed.op == PARTIAL
    _refuse(
        ~is_partial & ((inputs < 1) | (inputs > MOST_DEPENDENCIES)),
        listed.uid,
        f"has a dependency list that is empty or over-long, expected 1 to {MOST_DEPENDENCIES}",
    )
    batch, _ = listed.destination
    _refuse(
        (batch < 0) & (-batch - 1 != listed.uid), listed.uid, "writes another uid's scratch row"
    )
    return listed


def _check_partials(partials: Listed, new_tokens: int) -> None:
    """Together, those of each sequence and group of tokens cover all keys once."""
    uid, batch, seq = partials.uid, partials.q_batch, partials.q_seq
    start, end, length = partials.keys
    _refuse((batch < 0) | (length < 0), uid, "has a negative q_batch or length")
    _refuse(
        (seq < 0) | (seq >= new_tokens) | (seq % QUERY_TOKENS != 0),
        uid,
        f"has q_seq outside the multiples of {QUERY_TOKENS} below {new_tokens} query tokens",
    )
    to_batch, to_seq = partials.destination
    _refuse((to_seq != seq) | ((to_batch >= 0) & (to_batch != batch)), uid, "writes another's row")
    _refuse((start < 0) | (start % STEP != 0), uid, f"starts at no multiple of {STEP}")
    _refuse((start > end) | ((start == end) & (length > 0)), uid, "has no keys")
    order = np.lexsort((start, seq, batch))
    uid, batch, seq, start, end, length = (
        array[order] for array in (uid, batch, seq, start, end, length)
    )
    first = np.ones(len(uid), bool)
    first[1:] = (batch[1:] != batch[:-1]) | (seq[1:] != seq[:-1])
    wanted = np.where(first, 0, np.roll(end, 1))
    _refuse(start != wanted, uid, "leaves keys out or covers some twice")
    last = np.roll(first, -1)
    _refuse(last & (end != length), uid, "is the last of its sequence and does not end at length")
    _refuse(~first & (length != np.roll(length, 1)), uid, "has another length than its sequence")


def _written(listed: Listed, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, token) of everything that is written: a partial writes several tokens."""
    token = listed.destination[1][:, None] + np.arange(QUERY_TOKENS)
    several = (listed.op == PARTIAL)[:, None]
    wanted = np.where(several, token < new_tokens, np.arange(QUERY_TOKENS) == 0)
    row, column = np.nonzero(wanted)
    return row, token[row, column]


def _pairs(first: np.ndarray, token: np.ndarray, new_tokens: int) -> np.ndarray:
    return np.sort(first.astype(np.int64) * new_tokens + token)


def _check_flow(listed: Listed, new_tokens: int, batch: int) -> None:
    """Every result is used once: by one reduction, or as the output of one query token."""
    to_batch, to_token = listed.destination
    _refuse(
        (listed.op != PARTIAL) & ((to_token < 0) | (to_token >= new_tokens)),
        listed.uid,
        f"writes a query token outside 0 to {new_tokens - 1}",
    )
    row, token = _written(listed, new_tokens)
    outward = to_batch[row] >= 0
    outputs = _pairs(to_batch[row][outward], token[outward], new_tokens)
    if not np.array_equal(outputs, np.arange(batch * new_tokens)):
        raise ValueError(
            f"instructions: expected one result for each of {new_tokens} query tokens of "
            f"{batch} sequences, got {len(np.unique(outputs))} of {batch * new_tokens} in "
            f"{len(outputs)} writes"
        )
    reducer, dependency = listed.edges
    known = np.isin(dependency, listed.uid)
    _refuse(~known, dependency, "is a dependency that no instruction produces")
    made = _pairs(listed.uid[row][~outward], token[~outward], new_tokens)
    used = _pairs(dependency, to_token[reducer], new_tokens)
    for have, want, problem in (
        (used, made, "is a dependency for a query token that it has no result of"),
        (made, used, "has a result that no reduction uses"),
    ):
        _refuse(~np.isin(have, want), have // new_tokens, problem)
    _refuse(used[1:] == used[:-1], used[1:] // new_tokens, "is used twice")


def levels(listed: Listed) -> np.ndarray:
    """0 for partials, and for reductions one more than their dependencies' highest level."""
    level = np.zeros(len(listed.uid), np.int64)
    reducer, producer = listed.row_edges
    for _ in range(len(level)):
        raised = np.zeros_like(level)
        np.maximum.at(raised, reducer, level[producer] + 1)
        if np.array_equal(raised, level):
            return level
        level = raised
    raise ValueError("instructions: got a cycle of dependencies, expected a tree")


def _check_sequences(listed: Listed, level: np.ndarray) -> None:
    """A reduction puts together what belongs to its own sequence and group of tokens."""
    reducer, producer = listed.row_edges
    sequence = np.where(listed.op == PARTIAL, listed.q_batch, -1)
    for number in range(1, int(level.max()) + 1):
        now = level[reducer] == number
        sequence[reducer[now]] = sequence[producer[now]]
    to_batch, _ = listed.destination
    wrong = sequence[reducer] != sequence[producer]
    _refuse(wrong, listed.uid[reducer], "puts different sequences together")
    _refuse((to_batch >= 0) & (to_batch != sequence), listed.uid, "writes another sequence's row")


def check_table(table: np.ndarray, new_tokens: int, batch: int) -> tuple[Listed, np.ndarray]:
    """(instructions, their levels) of a table that is sound; ValueError or TypeError if it is not.

    Each sequence's keys are covered once, every result is used once, nothing waits in a circle.
    That the queues of processors do not wait for each other in one is the timeline's to find.
    """
    listed = _check_form(table)
    _check_partials(listed.partials, new_tokens)
    _check_flow(listed, new_tokens, batch)
    level = levels(listed)
    _check_sequences(listed, level)
    return listed, level
