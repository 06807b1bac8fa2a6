"""Plans for a persistent grid, against a plain walk over what each worker does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE

from pallas_kernels.paged_attention import Units, most_slots, pack
from pallas_kernels.schedule import SplitPlan, plan_segments
from pallas_kernels.schedule.arrays import COMPARED
from pallas_kernels.schedule.workers import (
    FEWEST_STEPS,
    MERGE_STEPS,
    SEGMENT_STEPS,
    WorkerPlan,
    most_worker_segments,
    plan_workers,
    spread,
)

# Units and workers: fewer, as many and more units than workers; and one of each.
SHAPES = [(1, 1), (1, 9), (6, 1), (6, 4), (5, 37), (8, 8), (30, 8)]

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@functools.cache
def planner(workers: int):
    """The plan, and its tables for units whose rows tell them apart."""

    def run(steps):
        plan = plan_workers(steps, workers)
        return plan, tables(plan.split)

    return quick(run)


def tables(plan: SplitPlan):
    index = jnp.arange(plan.parts.shape[0], dtype=jnp.int32)
    return pack(Units(*(index * 100 + field + 1 for field in range(len(Units._fields)))), plan)


@functools.cache
def spreader(workers: int, segments: int, natural: bool):
    """Cuts from each unit's own share, in order of unit or as `plan_segments` leaves them."""

    def run(steps, share):
        plan = plan_segments(steps, share, segments)
        if natural:
            order = jnp.argsort(plan.slot)
            arrays = (array[order] for array in plan[:4])
            plan = SplitPlan(*arrays, first_slot=plan.first_slot, parts=plan.parts)
        return WorkerPlan(plan, spread(plan, workers))

    return quick(run)


def run_plan(steps: list[int], workers: int) -> WorkerPlan:
    """The plan in NumPy, walked, with its tables."""
    plan, work = jax.device_get(planner(workers)(jnp.asarray(steps, jnp.int32)))
    walk(steps, workers, plan)
    assert len(plan.split.unit) == most_worker_segments(len(steps), workers)
    real = plan.first[-1]
    np.testing.assert_array_equal(plan.split.slot, np.arange(len(plan.split.slot)))
    keys = list(zip(plan.split.unit[:real], plan.split.begin[:real], strict=True))
    assert keys == sorted(keys)
    assert not plan.split.begin[real:].any()
    assert not plan.split.end[real:].any()
    walk_tables(plan.split, work)
    return plan


def walk(steps: list[int], workers: int, plan: WorkerPlan) -> None:
    """Every step of every unit is done once, by one worker, and the merge finds all results."""
    split, first = plan
    assert all(array.dtype == np.int32 for array in jax.tree.leaves(plan))
    assert first.shape == (workers + 1,)
    assert first[0] == 0
    assert (first[1:] >= first[:-1]).all()
    busy = split.unit < len(steps)
    assert busy[: first[-1]].all()
    assert (split.unit[first[-1] :] == len(steps)).all()

    cuts = [[] for _ in steps]
    slots = [[] for _ in steps]
    for worker in range(workers):
        for i in range(first[worker], first[worker + 1]):
            cuts[split.unit[i]].append((int(split.begin[i]), int(split.end[i])))
            slots[split.unit[i]].append(int(split.slot[i]))
    next_slot = 0
    for unit, count in enumerate(steps):
        assert split.parts[unit] == len(cuts[unit])
        assert split.first_slot[unit] == next_slot
        assert sorted(slots[unit]) == list(range(next_slot, next_slot + len(cuts[unit])))
        next_slot += len(cuts[unit])
        if count == 0:
            assert cuts[unit] == [(0, 0)]
            continue
        done = 0
        for begin, end in sorted(cuts[unit]):
            assert begin == done
            assert begin < end
            done = end
        assert done == count


def walk_tables(plan: SplitPlan, work) -> None:
    """A row for each segment, scratch slots for split units alone, a merge for each of these."""
    units, segments = len(plan.parts), len(plan.unit)
    slots = {}
    for unit, begin, end, row in zip(
        plan.unit.tolist(), plan.begin.tolist(), plan.end.tolist(), work.segments, strict=True
    ):
        fields = [100 * unit + field + 1 for field in range(len(Units._fields))]
        split = unit < units and plan.parts[unit] > 1
        assert row[:2].tolist() == [begin, end]
        assert row[3:].tolist() == (fields if unit < units else [0] * len(fields))
        assert (row[2] >= 0) == split
        if split:
            slots.setdefault(unit, []).append(int(row[2]))
    used = [slot for of_unit in slots.values() for slot in of_unit]
    assert len(used) == len(set(used))
    assert all(0 <= slot < most_slots(segments, units) for slot in used)
    merges = {}
    for parts, first, base, _, _ in work.merges.tolist():
        if parts > 1:
            merges[base // 100] = list(range(first, first + parts))
    assert merges == slots


def loads(plan: WorkerPlan) -> list[int]:
    """What each worker does, in steps."""
    cost = np.asarray(plan.split.end - plan.split.begin) + SEGMENT_STEPS
    return [int(cost[a:b].sum()) for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)]


def cost_of(plan: WorkerPlan) -> int:
    return max(loads(plan)) + (MERGE_STEPS if plan.split.parts.max() > 1 else 0)


def least_cost(steps: list[int], workers: int) -> int:
    """No plan is cheaper: every unit has a segment, and the work is shared at best equally."""
    return -(-(sum(steps) + SEGMENT_STEPS * len(steps)) // workers)


def equal_pieces_cost(steps: list[int], workers: int) -> int:
    """The best of one segment a worker, every unit cut at multiples of the same length."""
    longest = max(*steps, 1)
    for length in range(1, longest):
        if sum(max(-(-count // length), 1) for count in steps) <= workers:
            return min(length + MERGE_STEPS, longest) + SEGMENT_STEPS
    return longest + SEGMENT_STEPS


def steps_of(units: int) -> st.SearchStrategy[list[int]]:
    """Many empty, many short, few long; and everything equal."""
    mixed = st.lists(
        st.one_of(st.just(0), st.integers(1, 8), st.integers(0, 300)),
        min_size=units,
        max_size=units,
    )
    return st.one_of(mixed, st.integers(0, 40).map(lambda number: [number] * units))


@pytest.mark.parametrize(("units", "workers"), SHAPES)
def test_plan(units, workers):
    """All work is done once, and nearly as soon as any plan could have it done."""

    @settings(deadline=None, max_examples=60)
    @given(steps_of(units))
    def check(steps):
        plan = run_plan(steps, workers)
        share = -(-(sum(steps) + SEGMENT_STEPS * (units - 1)) // workers)
        # One segment more than the share counts, two cuts that moved to ends, and a merge.
        excess = SEGMENT_STEPS + 2 * (FEWEST_STEPS - 1) + MERGE_STEPS
        assert least_cost(steps, workers) <= cost_of(plan) <= share + excess
        if units <= workers:
            assert cost_of(plan) <= equal_pieces_cost(steps, workers)

    check()


GOLDEN = {  # steps, workers, the longest worker's cost, segments
    "equal, two a worker": ([32] * 128, 66, 68, 128),
    "equal, one a worker": ([32] * 128, 132, 34, 128),
    "one short": ([32], 132, 3, 32),
    "one long": ([512], 132, 6, 128),
    "one of few": ([37, 353, 14, 14], 132, 6, 107),
    "eight": ([32] * 8, 66, 6, 64),
    "a few too many": ([32] * 140, 132, 40, 250),
    "nothing": ([0] * 5, 132, 2, 5),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    steps, workers, longest, segments = GOLDEN[name]
    plan = run_plan(steps, workers)
    assert max(loads(plan)) == longest
    assert plan.first[-1] == segments


def test_one_short_unit_is_cut_into_single_steps():
    """Idle workers are worse than small pieces."""
    plan = run_plan([32], 132)
    assert plan.split.begin[:32].tolist() == list(range(32))
    assert plan.first.tolist() == [min(worker, 32) for worker in range(133)]


def test_short_ragged_units(rng):
    """64 of 2 to 8 steps on 132 workers: at most four steps each, as two workers a unit have."""
    for _ in range(20):
        steps = rng.integers(2, 9, 64).tolist()
        plan = run_plan(steps, 132)
        assert cost_of(plan) <= equal_pieces_cost(steps, 132) <= 4 + SEGMENT_STEPS + MERGE_STEPS


@pytest.mark.parametrize("units", [128, 300])
def test_long_batches_are_balanced(rng, units):
    for longest in (600, 2000):
        steps = rng.integers(1, longest, units).tolist()
        assert cost_of(run_plan(steps, 132)) <= 1.03 * least_cost(steps, 132)


def test_units_stay_whole_where_splitting_gains_nothing():
    for steps in ([10] * 8, [0] * 8, [1, 2, 3, 2, 0, 1, 4, 3]):
        assert run_plan(steps, 8).split.parts.tolist() == [1] * 8
    assert run_plan([7] * 30, 10).split.parts.tolist() == [1] * 30


def test_one_long_unit_among_empty_ones():
    """It is spread over the workers, wherever it stands."""
    for units, workers in ((5, 37), (30, 8)):
        for place in range(units):
            steps = [0] * units
            steps[place] = 1000
            assert run_plan(steps, workers).split.parts[place] >= 0.8 * workers


def test_more_units_than_are_summed_by_a_mask(rng):
    steps = rng.integers(0, 20, COMPARED + 76).tolist()
    plan = run_plan(steps, 7)
    assert cost_of(plan) <= 1.01 * least_cost(steps, 7)


@pytest.mark.parametrize("units", [1, 3, 1100])
@pytest.mark.parametrize("workers", [7, 1024])
def test_totals_up_to_the_bound(units, workers):
    """Steps and what the segments cost come to 2^30, and nothing overflows int32."""
    equal = 2**30 // units - SEGMENT_STEPS
    uneven = [1] * units
    uneven[units // 2] = 2**30 - SEGMENT_STEPS * units - (units - 1)
    for steps in ([equal] * units, uneven):
        plan = run_plan(steps, workers)
        assert cost_of(plan) <= 1.01 * least_cost(steps, workers)


@pytest.mark.parametrize("units", [6, 30])
def test_one_compilation_for_all_lengths(rng, units):
    traces = []

    @quick
    def run(steps):
        traces.append(steps)
        return plan_workers(steps, 8)

    for longest in (1, 30, 10_000):
        steps = rng.integers(0, longest, units).tolist()
        walk(steps, 8, jax.device_get(run(jnp.asarray(steps, jnp.int32))))
    assert len(traces) == 1


@pytest.mark.parametrize("units", [6, 30, COMPARED + 1])
def test_no_loop_and_no_callback(units):
    """Nothing that a decode step would wait for: neither a loop on the device nor the host."""

    def run(steps):
        plan = plan_workers(steps, 8)
        return plan, spread(plan.split, 8)

    program = jax.jit(run).lower(jax.ShapeDtypeStruct((units,), jnp.int32)).as_text()
    assert "stablehlo.reduce" in program
    for word in ("stablehlo.while", "stablehlo.sort", "stablehlo.scatter", "callback"):
        assert word not in program


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize(("units", "workers"), SHAPES)
def test_spread(units, workers, natural):
    """Given cuts stay as they are; a worker has at most an equal share and a segment."""
    run = spreader(workers, 40 * units, natural)

    @settings(deadline=None, max_examples=50)
    @given(steps_of(units), st.lists(st.integers(8, 30), min_size=units, max_size=units))
    def check(steps, share):
        arrays = (jnp.asarray(array, jnp.int32) for array in (steps, share))
        plan = jax.device_get(run(*arrays))
        walk(steps, workers, plan)
        number = int(plan.split.parts.sum())
        cost = (plan.split.end - plan.split.begin)[:number] + SEGMENT_STEPS
        if number <= workers:
            assert max(loads(plan)) == cost.max()
        assert max(loads(plan)) <= -(-cost.sum() // workers) + cost.max()

    check()


def test_spread_gives_equal_segments_out_equally():
    steps, share = (jnp.full(30, number, jnp.int32) for number in (16, 8))
    plan = jax.device_get(spreader(8, 60, True)(steps, share))
    assert sorted(set(np.diff(plan.first).tolist())) == [7, 8]


def test_spread_totals_up_to_the_bound():
    steps = [2**30 // 30 - SEGMENT_STEPS] * 30
    arrays = jnp.asarray(steps, jnp.int32), jnp.full(30, 2**30, jnp.int32)
    for workers in (7, 1024):
        plan = jax.device_get(spreader(workers, 60, True)(*arrays))
        walk(steps, workers, plan)
        assert max(loads(plan)) == (steps[0] + SEGMENT_STEPS) * -(-30 // workers)
