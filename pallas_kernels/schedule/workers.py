"""Work plans for a persistent grid: which stretch of all the work each thread block does.

Where `split` cuts units into segments for blocks that the device starts as others end, here the
blocks stay: as many workers as run at a time, each with one stretch of the segments in order of
unit and step, as FlashMLA's scheduler deals them. A worker's next segment can load while the last
one computes, and nothing waits for a block that started late.

FlashMLA's scheduler walks from worker to worker; here every cut is a closed form of its unit and
worker, so that a plan is a few small device operations without a loop or a host copy. Everything is
int32: all steps plus SEGMENT_STEPS for each unit may come to 2^30, for at most 1024 workers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.schedule.arrays import COMPARED, ceil_div, sum_before
from pallas_kernels.schedule.split import SplitPlan

SEGMENT_STEPS = 2
"""What a segment costs beyond its steps, in steps: it starts, loads queries, writes a result."""
FEWEST_STEPS = 2
"""The shortest piece of a unit that is worth its segment, where a worker has more to do."""
MERGE_STEPS = 3
"""What merging the pieces of split units costs, in steps: a launch after the last piece."""


class WorkerPlan(NamedTuple):
    """Worker w does segments first[w]:first[w + 1] of `split`, in this order.

    The segments of `plan_workers` stand in order of unit and begin, so that slot[i] = i; those
    beyond the last unit's are no worker's, and have begin = end = 0.
    """

    split: SplitPlan
    first: Int[Array, " workers_plus_1"]


class _Cuts(NamedTuple):
    """Segment j of unit u is done by worker owner[u] + j, for each j < parts[u].

    It begins at step j * share + ahead[u], the first at 0, and ends where the next one begins.
    """

    share: Int[Array, "*axes 1"]
    owner: Int[Array, "*axes units"]
    parts: Int[Array, "*axes units"]
    ahead: Int[Array, "*axes units"]


def most_worker_segments(units: int, workers: int) -> int:
    """A bound on the segments of `plan_workers`: where workers meet, one unit at most is cut."""
    return units + workers - 1


def plan_workers(steps: Int[Array, " units"], workers: int) -> WorkerPlan:
    """The work of `workers` workers that should be done first.

    The estimate, in steps: those of the worker that does most, SEGMENT_STEPS more for each of its
    segments, and MERGE_STEPS if any unit is split. It is taken of a few plans; of equal ones that
    without splits goes first. The plan's estimate is at most

        ceil((sum(steps) + SEGMENT_STEPS * (units - 1)) / workers)
            + SEGMENT_STEPS + 2 * (FEWEST_STEPS - 1) + MERGE_STEPS

    where none can be below (sum(steps) + SEGMENT_STEPS * units) / workers. With a worker for each
    unit, it is also at most that of any plan whose workers have one segment each, cut at multiples
    of one length.

    Args:
        steps: what each unit has to do, int32, at least 0; the sum is bounded as said above.
        workers: thread blocks, or clusters, that run at a time.

    >>> plan = plan_workers(jnp.asarray([9, 0, 30], jnp.int32), 2)
    >>> plan.first.tolist()
    [0, 3, 4]
    >>> plan.split.unit.tolist(), plan.split.begin.tolist(), plan.split.end.tolist()
    ([0, 1, 2, 2], [0, 0, 0, 9], [9, 0, 9, 30])
    """
    units = steps.shape[0]
    plans = _equal_pieces(steps, workers) if units <= workers else _whole_units(steps, workers)
    plans = jax.tree.map(
        lambda few, one: jnp.concatenate([few, one[None]]), plans, _stretches(steps, workers)
    )

    by_worker = jax.tree.map(lambda array: array[:, None], plans)
    worker = jnp.arange(workers + 1, dtype=jnp.int32)[:, None]
    segments = jnp.clip(worker - by_worker.owner, 0, by_worker.parts)  # of each unit, before w's
    first = jnp.sum(segments, axis=-1, dtype=jnp.int32)
    done = jnp.sum(_begin(by_worker, steps, segments), axis=-1, dtype=jnp.int32)
    estimate = jnp.max(jnp.diff(done + SEGMENT_STEPS * first), axis=-1)
    estimate += jnp.where(first[:, -1] > units, MERGE_STEPS, 0)
    possible = plans.owner[:, -1] + plans.parts[:, -1] <= workers
    best = jnp.argmin(jnp.where(possible, estimate, jnp.iinfo(jnp.int32).max))

    cuts = jax.tree.map(lambda array: array[best], plans)
    return WorkerPlan(_segments(cuts, steps, most_worker_segments(units, workers)), first[best])


def spread(plan: SplitPlan, workers: int) -> Int[Array, " workers_plus_1"]:
    """`WorkerPlan.first` for cuts that are given: segments in the plan's order, none cut further.

    For plans whose cuts must not depend on the other units (`deterministic`). Each segment goes to
    the worker in whose equal share of all costs its middle lies, so that no worker has more than
    such a share and the longest segment's cost; or to one of its own, if there are workers enough.
    Segments beyond the last unit's must stand last, as those of `plan_segments` do.
    """
    busy = plan.unit < plan.parts.shape[0]
    cost = jnp.where(busy, plan.end - plan.begin + SEGMENT_STEPS, 0)
    share = ceil_div(jnp.sum(cost, dtype=jnp.int32), workers)
    index = jnp.arange(busy.shape[0], dtype=jnp.int32)
    few = jnp.sum(busy, dtype=jnp.int32) <= workers
    owner = jnp.where(few, index, (sum_before(cost) + cost // 2) // share)
    before = busy & (owner < jnp.arange(workers + 1, dtype=jnp.int32)[:, None])
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def _equal_pieces(steps: Array, workers: int) -> _Cuts:
    """Plans with a worker for each segment: units whole, then cut at multiples of one length.

    With a worker for each unit, `_stretches` is no dearer than a length of SEGMENT_STEPS +
    2 * (FEWEST_STEPS - 1) above an equal share of the steps: only shorter ones are tried. These may
    need more workers than there are.
    """
    share = jnp.maximum(ceil_div(jnp.sum(steps, dtype=jnp.int32), workers), 1)
    share += jnp.arange(SEGMENT_STEPS + 2 * (FEWEST_STEPS - 1), dtype=jnp.int32)
    share = jnp.concatenate([jnp.maximum(jnp.max(steps, keepdims=True), 1), share])[:, None]
    parts = jnp.maximum(ceil_div(steps, share), 1)
    return _Cuts(share, owner=sum_before(parts), parts=parts, ahead=jnp.zeros_like(parts))


def _stretches(steps: Array, workers: int) -> _Cuts:
    """Equal stretches of a line on which units stand one after the other, cut where they end.

    SEGMENT_STEPS stand between units, so that a stretch's cost is its length and SEGMENT_STEPS,
    whether it begins with a new unit or goes on with a cut one. Cuts too near to a unit's start or
    end, or behind its end, move there: worker owner[u] is the last that begins before u may be cut.
    """
    start, share = _line(steps, workers)
    fewest = jnp.minimum(share, FEWEST_STEPS)
    owner = (start + fewest - 1) // share
    parts = jnp.maximum((start + steps - fewest) // share - owner, 0) + 1
    return _Cuts(share, jnp.minimum(owner, workers - 1), parts, ahead=owner * share - start)


def _whole_units(steps: Array, workers: int) -> _Cuts:
    """The same stretches, with every cut moved to the nearer end of the unit that it lies in."""
    start, share = _line(steps, workers)
    owner = jnp.minimum((start + (steps + SEGMENT_STEPS) // 2) // share, workers - 1)
    parts = jnp.ones_like(owner)
    cuts = _Cuts(share, owner, parts, ahead=jnp.zeros_like(owner))  # of no second segment
    return jax.tree.map(lambda array: array[None], cuts)


def _line(steps: Array, workers: int) -> tuple[Array, Array]:
    """Where units start on the line of `_stretches`, and how long an equal stretch of it is."""
    start = sum_before(steps + SEGMENT_STEPS)
    return start, jnp.maximum(ceil_div(start[-1:] + steps[-1:], workers), 1)


def _begin(cuts: _Cuts, steps: Array, segment: Array) -> Array:
    """The step at which this segment of its unit begins, or would if the unit had one more."""
    cut = segment * cuts.share + cuts.ahead
    return jnp.where(segment == 0, 0, jnp.where(segment < cuts.parts, cut, steps))


def _segments(cuts: _Cuts, steps: Array, segments: int) -> SplitPlan:
    """The plan that the cuts make, in order of unit and begin."""
    first_slot = sum_before(cuts.parts)
    slot = jnp.arange(segments, dtype=jnp.int32)
    method = "compare_all" if steps.shape[0] <= COMPARED else "scan_unrolled"
    unit = jnp.searchsorted(first_slot + cuts.parts, slot, side="right", method=method)
    unit = unit.astype(jnp.int32)
    busy = unit < steps.shape[0]
    inside = jnp.minimum(unit, steps.shape[0] - 1)
    segment = slot - first_slot[inside]
    own = _Cuts(cuts.share, cuts.owner[inside], cuts.parts[inside], cuts.ahead[inside])
    begin, end = (_begin(own, steps[inside], segment + more) for more in (0, 1))
    begin, end = (jnp.where(busy, step, 0) for step in (begin, end))
    return SplitPlan(unit, begin, end, slot, first_slot=first_slot, parts=cuts.parts)
