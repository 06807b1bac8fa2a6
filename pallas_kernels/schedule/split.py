"""Split plans: into which segments units of work are cut, and in which order they start.

A unit is a set of query rows with a number of steps (blocks of keys) to go through. A segment is a
stretch of one unit's steps, done by one block of a launch; the results of a unit of several
segments are merged afterwards. Plans are arrays with static shapes, made by a few small device
operations and no host copy; XLA makes a plan once in a program, however many layers use it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.schedule.arrays import ceil_div, sorted_by, sum_before

START_STEPS = 3
"""What starting a segment costs, in steps: the first loads, on which nothing can wait."""
MERGE_STEPS = 2
"""What merging costs beyond the launch that is there in any case."""
EIGHTHS = (4, 6, 8, 9, 10, 12, 16, 24, 32)
"""Longest segments that are considered, in eighths of an equal share of the work."""


class SplitPlan(NamedTuple):
    """Segment i does steps begin[i]:end[i] of unit[i]; long segments come first.

    slot[i] counts segments unit by unit: unit u's are first_slot[u] and the parts[u] - 1 after it.
    A unit without steps has one segment too, which writes its empty result. Segments beyond the
    last unit's have unit[i] = number of units, and nothing to do.
    """

    unit: Int[Array, " segments"]
    begin: Int[Array, " segments"]
    end: Int[Array, " segments"]
    slot: Int[Array, " segments"]
    first_slot: Int[Array, " units"]
    parts: Int[Array, " units"]


def plan_segments(
    steps: Int[Array, " units"], share: Int[Array, " units"], segments: int
) -> SplitPlan:
    """Each unit in equal segments of at most share[u] >= 1 steps.

    How a unit is cut depends on its own steps and share alone. `segments` must be at least the sum
    of steps / share, rounded up, and of 1 for a unit without steps.
    """
    length = jnp.maximum(ceil_div(steps, jnp.maximum(ceil_div(steps, share), 1)), 1)
    parts = jnp.maximum(ceil_div(steps, length), 1)
    first_slot = sum_before(parts)
    past = first_slot + parts
    slot = jnp.arange(segments, dtype=jnp.int32)
    unit = jnp.searchsorted(past, slot, side="right", method="compare_all").astype(jnp.int32)
    inside = jnp.minimum(unit, steps.shape[0] - 1)
    begin = (slot - first_slot[inside]) * length[inside]
    end = jnp.minimum(begin + length[inside], steps[inside])
    made = unit, begin, end, slot
    if steps.shape[0] > 1:
        # A block that starts late must not be long: the launch would wait for it.
        made = sorted_by(jnp.where(unit < steps.shape[0], begin - end, 1), made)
    return SplitPlan(*made, first_slot=first_slot, parts=parts)


def most_segments(units: int, workers: int) -> int:
    """A bound on the segments that `balanced_share` leads to."""
    return units + workers * 8 // min(EIGHTHS) + 1


def balanced_share(steps: Int[Array, " units"], workers: int) -> Int[Array, " units"]:
    """The segment length that should end first, when `workers` segments run at a time.

    Short segments spread the work evenly, but each must start, and be merged. What a length costs
    is estimated in steps: its segments in one round take as long as the longest; in several, an
    equal share of all and half of the longest.
    """
    total, longest = jnp.sum(steps, dtype=jnp.int32), jnp.max(steps)
    eighths = jnp.asarray(EIGHTHS, jnp.int32)
    share = total // (8 * workers) * eighths + ceil_div(
        total % (8 * workers) * eighths, 8 * workers
    )
    share = jnp.clip(jnp.append(share, longest), 1, jnp.maximum(longest, 1))
    count = jnp.sum(jnp.maximum(ceil_div(steps, share[:, None]), 1), axis=1)
    rounds = ceil_div(count, workers)
    queued = jnp.maximum(ceil_div(total, workers) + share // 2, share)
    cost = jnp.where(rounds > 1, queued, share) + START_STEPS * rounds
    cost += jnp.where(share < longest, MERGE_STEPS, 0)
    return jnp.full_like(steps, 1) * share[jnp.argmin(cost)]
