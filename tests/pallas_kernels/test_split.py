"""Split plans and their tables, against a plain walk over the segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE

from pallas_kernels.device import Device
from pallas_kernels.paged_attention import PagedProblem, Units, choose_tiles, most_slots, pack
from pallas_kernels.paged_attention.tiles import choose_workers
from pallas_kernels.paged_decode.triton import plan_splits
from pallas_kernels.schedule import SplitPlan, balanced_share, most_segments, plan_segments

SHAPES = [(1, 1), (1, 9), (6, 4), (5, 37), (30, 8)]  # units, workers

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@functools.cache
def balanced(workers: int):
    """A launch that `workers` segments of run at a time."""

    def run(steps):
        share = balanced_share(steps, workers)
        return share, *planned(plan_segments(steps, share, most_segments(len(steps), workers)))

    return quick(run)


@functools.cache
def by_share(segments: int):
    return quick(lambda steps, share: planned(plan_segments(steps, share, segments)))


def planned(plan: SplitPlan):
    """The plan, and its tables for units whose rows tell them apart."""
    index = jnp.arange(plan.parts.shape[0], dtype=jnp.int32)
    units = Units(*(index * 100 + field + 1 for field in range(len(Units._fields))))
    return plan, pack(units, plan)


def steps_of(units: int) -> st.SearchStrategy[list[int]]:
    """Many empty, many short, few long; and everything equal."""
    mixed = st.lists(
        st.one_of(st.just(0), st.integers(1, 4), st.integers(0, 300)),
        min_size=units,
        max_size=units,
    )
    return st.one_of(mixed, st.integers(0, 40).map(lambda number: [number] * units))


def walk(steps: list[int], plan: SplitPlan, work) -> list[list[tuple[int, int]]]:
    """The segments (begin, end) of every unit, in order; plan and tables are checked.

    What the kernel does, and what its merge reads: the segments of a unit cover each step once,
    every segment of a split unit has a slot of its own, and the unit's merge takes all of them.
    """
    plan = jax.tree.map(np.asarray, plan)
    table, merges, splits = (np.asarray(array) for array in work)
    cuts = [[] for _ in steps]
    slots = {}
    lengths = []
    for unit, begin, end, slot, row in zip(
        *(plan.unit, plan.begin, plan.end, plan.slot), table.tolist(), strict=True
    ):
        if unit >= len(steps):
            assert row[3:] == [0] * len(Units._fields)  # owns no row
            continue
        lengths.append(end - begin)
        assert row[:2] == [begin, end]
        assert row[3:] == [100 * unit + field + 1 for field in range(len(Units._fields))]
        cuts[unit].append((int(begin), int(end)))
        assert plan.first_slot[unit] <= slot < plan.first_slot[unit] + plan.parts[unit]
        if plan.parts[unit] > 1:
            slots.setdefault(unit, set()).add(row[2])
        else:
            assert row[2] == -1
    assert lengths == sorted(lengths, reverse=True)

    for unit, (count, seen) in enumerate(zip(steps, cuts, strict=True)):
        seen.sort()
        assert len(seen) == plan.parts[unit]
        if count == 0:
            assert seen == [(0, 0)]
            continue
        assert all(begin < end for begin, end in seen)
        edges = [0, *(end for _, end in seen)]
        assert [begin for begin, _ in seen] == edges[:-1]
        assert edges[-1] == count

    used = [slot for of_unit in slots.values() for slot in of_unit]
    assert len(used) == len(set(used))
    assert all(0 <= slot < most_slots(len(table), len(steps)) for slot in used)
    merged = {}
    assert splits.tolist() == [len(slots)]
    # The kernel looks no further.
    for count, first, base, offset, owned in merges[: len(slots)].tolist():
        if count > 1:
            unit = base // 100
            assert [base, offset, owned] == [100 * unit + field + 1 for field in (0, 1, 3)]
            assert unit not in merged
            merged[unit] = set(range(first, first + count))
    assert merged == slots
    return cuts


@pytest.mark.parametrize(("units", "workers"), SHAPES)
def test_balanced(units, workers):
    """A launch takes about as long as an equal share of the work, or as a plain one."""

    @settings(deadline=None, max_examples=50)
    @given(steps_of(units))
    def check(steps):
        share, plan, work = balanced(workers)(jnp.asarray(steps, jnp.int32))
        assert len(set(share.tolist())) == 1
        assert int(share[0]) >= 1
        cuts = walk(steps, plan, work)
        # Segments in the plan's order, each by the worker that is free first.
        free = np.zeros(workers)
        for begin, end in zip(plan.begin.tolist(), plan.end.tolist(), strict=True):
            free[free.argmin()] += end - begin
        equal = -(-sum(steps) // workers)
        longest = max(end - begin for seen in cuts for begin, end in seen)
        assert free.max() <= equal + longest
        assert longest <= max(4 * equal, 1) or longest == max(steps)

    check()


@pytest.mark.parametrize("units", [1, 2, 5])
def test_balanced_splits_one_long_unit(units):
    """Among all workers, wherever it stands among empty ones."""
    for place in range(units):
        steps = [0] * units
        steps[place] = 1000
        _, plan, _ = balanced(10)(jnp.asarray(steps, jnp.int32))
        assert 10 - units <= int(plan.parts[place]) <= 20
        longest = int((plan.end - plan.begin).max())
        assert longest <= 1000 // (10 - units) + 1


def test_balanced_keeps_short_units_whole():
    """Where splitting would cost more than it gains."""
    for steps in ([1, 2, 3, 2], [10, 10, 10, 10], [0, 0, 1, 0]):
        _, plan, _ = balanced(4)(jnp.asarray(steps, jnp.int32))
        assert plan.parts.tolist() == [1] * 4


@pytest.mark.parametrize("units", [1, 5, 30])
def test_given_shares(units):
    segments = 40 * units

    @settings(deadline=None, max_examples=50)
    @given(steps_of(units), st.lists(st.integers(8, 30), min_size=units, max_size=units))
    def check(steps, share):
        arrays = (jnp.asarray(array, jnp.int32) for array in (steps, share))
        plan, work = by_share(segments)(*arrays)
        for count, most, seen in zip(steps, share, walk(steps, plan, work), strict=True):
            lengths = [end - begin for begin, end in seen]
            assert len(seen) <= max(-(-count // most), 1)
            assert max(lengths) <= most
            assert lengths[:-1] == lengths[:1] * (len(lengths) - 1)

    check()


H200 = Device(platform="gpu", kind="an H200 without a table", num_cores=132)


def problem_of(lengths: list[int]) -> PagedProblem:
    """As many page ids as the lengths need."""
    return PagedProblem(
        op="paged_decode",
        batch=len(lengths),
        tokens=1,
        heads=16,
        latent=512,
        rope=64,
        page_size=64,
        dtype="bfloat16",
        num_ids=max(sum(-(-length // 64) for length in lengths), 1),
    )


def decode_plan(lengths: list[int], **options) -> SplitPlan:
    problem = problem_of(lengths)
    options = {"num_splits": None, "deterministic": False, **options}
    tiles = choose_tiles(problem, H200)
    assert tiles.keys == 64
    return plan_splits(jnp.asarray(lengths, jnp.int32), problem, tiles, H200, **options)


def cuts_of(plan: SplitPlan, unit: int) -> list[tuple[int, int]]:
    mine = np.asarray(plan.unit) == unit
    return sorted(zip(plan.begin[mine].tolist(), plan.end[mine].tolist(), strict=True))


OTHERS = [[0], [1, 2, 3], [100_000], [64] * 300]


@pytest.mark.parametrize("length", [0, 64 * 8 + 1, 100_000])
def test_deterministic_cuts_follow_from_a_request_alone(length):
    alone = cuts_of(decode_plan([length], deterministic=True), 0)
    for others in OTHERS:
        before = decode_plan([*others, length], deterministic=True)
        after = decode_plan([length, *others], deterministic=True)
        assert cuts_of(before, len(others)) == cuts_of(after, 0) == alone


def test_other_cuts_follow_from_the_batch():
    cuts = {tuple(cuts_of(decode_plan([5000, *others]), 0)) for others in OTHERS}
    assert len(cuts) > 1


@pytest.mark.parametrize("num_splits", [1, 3, 64])
def test_num_splits(num_splits):
    lengths = [0, 1, 64 * 3, 64 * 64 * 25]
    plan = decode_plan(lengths, num_splits=num_splits)
    steps = [-(-length // 64) for length in lengths]
    most = [max(min(num_splits, count), 1) for count in steps]
    assert all(parts <= bound for parts, bound in zip(plan.parts.tolist(), most, strict=True))
    assert plan.parts.tolist()[-1] == num_splits


@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"num_splits": 5}], ids=str)
def test_there_are_segments_enough(rng, options):
    """Under the bound that the shapes set: as many page ids as the lengths need."""
    for lengths in (
        [0],
        [64],
        [64 * 132],
        [64] * 50,
        (rng.integers(0, 40_000, 50) * rng.integers(0, 2, 50)).tolist(),
        (rng.integers(1, 70, 50)).tolist(),
        [200_000, *[1] * 30],
    ):
        plan, work = planned(decode_plan(lengths, **options))
        walk([-(-length // 64) for length in lengths], plan, work)


def test_workers_are_used():
    """One request alone is spread over the whole device."""
    problem = problem_of([64 * 4000])
    workers = choose_workers(choose_tiles(problem, H200), H200, 1)
    assert int(decode_plan([64 * 4000]).parts[0]) >= 0.9 * workers
