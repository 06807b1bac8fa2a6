"""The megakernel's schedules: qualities, golden tables, invariants, times."""

import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lowered import A100, only

from pallas_kernels.schedule import CostModel, Schedule, get_quality, schedule
from pallas_kernels.schedule.instructions.processors import split_processors
from pallas_kernels.schedule.instructions.tree import deal_steps

F = np.float32
RECORD = [4641, 45118, 1730, 1696]


def stated_quality(next_times, processors, tokens, length) -> float:
    """The contract's loops, one float32 operation after the other."""
    steps = (length + 31) // 32
    if len(next_times) > processors:
        return -999999999.0
    times = sorted((F(time) for time in next_times), reverse=True)
    number, part = len(times), []
    for i in range(processors):
        times[i % number] = F(times[i % number] - F(0.4))
        part.append(times[i % number])
    part.sort()
    for j in range(number):
        for k in range(tokens):
            if tokens * j + k < processors:
                part[tokens * j + k] = F(F(times[j] + F(1.0)) - F(2.0))
    part.sort(reverse=True)
    least = part[-1]
    for i in range(processors):
        if steps <= 0:
            break
        share = float(F(F(part[i] - least) / F(1.49)))
        got = min(steps, int(share + 0.5))
        steps -= got
        part[i] = F(part[i] - F(F(got) * F(1.49)))
        if got > 0:
            part[i] = F(part[i] - F(7.5))
    full, rest = divmod(steps, processors)
    part.sort(reverse=True)
    return float(min(F(t - F(F(1.49) * F(full + (i < rest)))) for i, t in enumerate(part)))


GOLDEN_QUALITIES = [
    (([100, 95, 90, 85], 4, 8, 1024), 86.68),
    (([-2.5], 1, 1, 32), -5.39),
    (([-2.5], 4, 4, 1024), -17.02),
    (([-2.9, -5], 4, 4, 1024), -16.62),
    (([0], 1, 1, 0), -1.4),
    (([0, 0], 1, 1, 32), -999999999.0),
]


@pytest.mark.parametrize(("args", "value"), GOLDEN_QUALITIES)
def test_golden_qualities(args, value):
    assert stated_quality(*args) == pytest.approx(value, abs=5e-6)
    assert get_quality(*args) == stated_quality(*args)


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=20),
    st.one_of(st.integers(1, 20), st.integers(1, 140)),
    st.integers(1, 8),
    st.one_of(st.integers(0, 2000), st.integers(0, 200_000)),
)
def test_quality_to_the_bit(next_times, processors, tokens, length):
    got = get_quality(next_times, processors, tokens, length)
    assert got == stated_quality(next_times, processors, tokens, length)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (([], 1, 1, 1), "next_times: got no time, expected one for each reduction"),
        (([0.0], 0, 1, 1), "num_processors: got 0, expected at least 1"),
        (([0.0], 1, 0, 1), "num_tokens: got 0, expected at least 1"),
        (([0.0], 1, 1, -1), "seq_length: got -1, expected at least 0"),
    ],
)
def test_quality_errors(args, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        get_quality(*args)


def padded(*instructions: list[int]) -> list[list[int]]:
    return [words + [0] * (32 - len(words)) for words in instructions]


def test_golden_table():
    plan = schedule([300], 2, num_processors=2)
    assert plan.instructions.dtype == np.int32
    first = padded([1, 0, -1, 0, 0, 0, 0, 160, 300], [2, 132, 1, 0, 0, 1, 0])
    second = padded([1, 1, -2, 0, 0, 0, 160, 300, 300], [2, 133, 1, 0, 1, 1, 0])
    assert plan.instructions[:, :2].tolist() == [first, second]
    assert not plan.instructions[:, 2:].any()
    assert plan.uids.tolist() == [0, 1, 132, 133]
    # 7.5 and five steps; then 4, two inputs of 0.4, 1 and 0.5.
    assert plan.makespan == pytest.approx(7.5 + 5 * 1.49 + 4 + 2 * 0.4 + 1.5)


def test_one_processor_writes_the_output():
    plan = schedule([300], 3, num_processors=1)
    assert plan.instructions[0, :1].tolist() == padded([1, 0, 0, 0, 0, 0, 0, 300, 300])
    assert plan.makespan == pytest.approx(7.5 + 10 * 1.49)


SHAPES = {  # lengths, new tokens, the most partials, the longest makespan in µs
    "record": (RECORD, 4, 132, 42.5),
    "record, one token": (RECORD, 1, 132, 38.0),
    "one long": ([65536], 1, 132, 42.0),
    "equal": ([512] * 64, 2, 132, 26.0),
    "one a processor": ([4096] * 132, 4, 132, 198.3),
    "ragged": ([256 + 12 * i for i in range(64)], 4, 132, 38.0),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("heads", [16, 8])
def test_shapes_of_record(name, heads):
    lengths, tokens, partials, longest = SHAPES[name]
    plan = schedule(lengths, tokens, 132, heads)
    assert plan.makespan <= longest
    check_invariants(plan, lengths, tokens)
    assert np.count_nonzero(plan.instructions[..., 0] == 1) <= partials


def check_invariants(plan: Schedule, lengths, tokens: int) -> None:
    """Read from the words alone: coverage, one producer and one consumer each, order, times."""
    instructions = [
        (processor, words.tolist())
        for processor, queue in enumerate(plan.instructions)
        for words in queue
        if words[0]
    ]
    for queue in plan.instructions:  # no-ops stand last
        busy = queue[:, 0] != 0
        assert not (busy[1:] & ~busy[:-1]).any()
        assert not queue[~busy].any()
    words_of = {words[1]: words for _, words in instructions}
    assert len(words_of) == len(instructions)
    partials = [words for _, words in instructions if words[0] == 1]
    reductions = [words for _, words in instructions if words[0] == 2]
    assert sorted(words[1] for words in partials) == list(range(len(partials)))
    base = max(132, len(partials))
    assert sorted(w[1] for w in reductions) == list(range(base, base + len(reductions)))

    produced, covered = {}, {}
    roots = []
    for _, uid, to_batch, to_token, batch, q_seq, start, end, length in (w[:9] for w in partials):
        assert length == lengths[batch]
        assert to_token == q_seq
        assert start < end or length == 0
        assert start % 32 == 0
        assert end % 32 == 0 or end == length
        for token in range(q_seq, min(q_seq + 4, tokens)):
            produced[uid, token] = np.asarray([start, end])
            if to_batch >= 0:
                assert to_batch == batch
                roots.append((batch, token))
                covered[batch, token] = [(start, end)]
            else:
                assert to_batch == -uid - 1
    used = []

    def leaves(uid: int, token: int) -> list[tuple[int, int]]:
        """The keys below a result; recursion would not end on a cycle."""
        words = words_of[uid]
        if words[0] == 1:
            assert words[5] <= token < min(words[5] + 4, tokens)
            return [(words[6], words[7])]
        assert words[4] == token
        assert 1 <= words[2] + 1 <= 27
        found = []
        for below in words[5 : 5 + words[2] + 1]:
            used.append((below, token))
            found += leaves(below, token)
        return found

    for words in reductions:
        if words[3] >= 0:
            roots.append((words[3], words[4]))
            covered[words[3], words[4]] = leaves(words[1], words[4])
        else:
            assert words[3] == -words[1] - 1
    wanted = [(batch, token) for batch in range(len(lengths)) for token in range(tokens)]
    assert sorted(roots) == wanted
    assert len(used) == len(set(used))
    for (batch, _), stretches in covered.items():
        ends = sorted(stretches)
        assert ends[0][0] == 0
        assert ends[-1][1] == lengths[batch]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))

    check_times(plan, dict(enumerate(plan.instructions)), words_of)


def check_times(plan: Schedule, queues: dict, words_of: dict[int, list[int]]) -> None:
    """Every instruction starts when its processor is free, and lasts what the model says."""
    costs = plan.cost_model
    end = {event.uid: event.end for event in plan.timeline()}
    assert sorted(end) == sorted(words_of)
    assert plan.makespan == max(end.values())
    for event in plan.timeline():
        queue = [int(words[1]) for words in queues[event.processor] if words[0]]
        place = queue.index(event.uid)
        assert event.start == (end[queue[place - 1]] if place else 0.0)
        words = words_of[event.uid]
        if words[0] == 1:
            assert event.op == "partial"
            steps = -(-(words[7] - words[6]) // 32)
            want = costs.partial_start + steps * costs.partial_step + costs.partial_writeout
            assert event.end - event.start == pytest.approx(want)
        else:
            assert event.op == "reduction"
            time = event.start + costs.reduction_start
            for uid in words[5 : 5 + words[2] + 1]:
                time = max(time, end[uid] + costs.reduction_latency) + costs.reduction_input
            want = time + costs.reduction_writeout + costs.synchronization
            assert event.end == pytest.approx(want)


LENGTHS = st.one_of(st.integers(0, 700), st.integers(0, 70_000))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(LENGTHS, min_size=1, max_size=12),
    st.integers(1, 8),
    st.one_of(st.integers(1, 9), st.integers(1, 200)),
)
@example([100_000], 4, 1000)  # far more than 27 inputs a reduction
@example([5, 0, 31, 32, 33], 4, 132)
@example([9000] * 3, 8, 40)
def test_any_batch(lengths, tokens, processors):
    plan = schedule(lengths, tokens, processors)
    assert plan.instructions.shape[0] == processors
    assert plan.instructions.shape[1] & (plan.instructions.shape[1] - 1) == 0
    check_invariants(plan, lengths, tokens)
    assert plan.lengths.tolist() == lengths


@pytest.mark.parametrize("longest", [300, 600, 20_000])
@pytest.mark.parametrize("tokens", [1, 4])
def test_splitting_is_never_slower(rng, tokens, longest):
    """Than a partial for each sequence: reductions that share a processor are counted too."""
    for _ in range(20):
        lengths = rng.integers(1, longest, 6).tolist()
        whole = max(7.5 + 1.49 * -(-length // 32) for length in lengths)
        for processors in (8, 20, 60):
            assert schedule(lengths, tokens, processors).makespan <= whole + 1e-9


def test_deal_steps(rng):
    """All steps, one each at least, and no dealing starts later: moving a step never helps."""
    costs = CostModel()
    for _ in range(50):
        number = int(rng.integers(1, 12))
        end = -rng.uniform(0, rng.choice([5, 60]), number)
        total = int(rng.integers(number, 8 * number))
        steps = deal_steps(total, end, costs)
        assert steps.sum() == total
        assert steps.min() >= 1
        start = end - 1.49 * steps
        for giver in np.flatnonzero((steps > 1) & (start == start.min())):
            after = np.delete(start, giver) - 1.49
            assert (after <= start.min() + 1e-9).all()


def test_processors_in_proportion():
    costs = CostModel()
    assert split_processors([(1, 8192)] * 4, 8, costs) == [2] * 4
    assert split_processors([(1, 100), (1, 100)], 8, costs) == [1, 1]  # too short to split
    few, many = split_processors([(1, 4096), (1, 40960)], 20, costs)
    assert few + many == 20
    assert many > 4 * few


def test_processors_of_the_device():
    with jax.sharding.use_abstract_mesh(A100):
        assert schedule([5000], 1).instructions.shape[0] == 108
    with jax.sharding.use_abstract_mesh(only("NVIDIA H200", 132)):
        assert schedule([5000], 1).instructions.shape[0] == 132


def test_a_measured_model_changes_the_schedule():
    """Dear reductions: fewer partials share a sequence."""
    dear = CostModel(reduction_start=400.0, reduction_start_in_quality=400.0)
    plans = [schedule([2048, 2048], 1, 8, cost_model=costs) for costs in (CostModel(), dear)]
    partials = [np.count_nonzero(plan.instructions[..., 0] == 1) for plan in plans]
    assert partials[1] == 2 < partials[0]


ERRORS = {
    "seq_lengths: got no sequence, expected at least one": ([], 1, 4, 16),
    "seq_lengths: got -1 to 5, expected 0 to 2147483647": ([5, -1], 1, 4, 16),
    "new_tokens: got 0, expected at least 1": ([5], 0, 4, 16),
    "num_processors: got 0, expected None or at least 1": ([5], 1, 0, 16),
    "num_heads: got 12, expected 16 or 8": ([5], 1, 4, 12),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        schedule(*ERRORS[text])


@pytest.mark.parametrize("value", [-1.0, float("nan"), 0.0])
def test_cost_errors(value):
    with pytest.raises(ValueError, match=r"^partial_step: got .* expected a time in µs"):
        CostModel(partial_step=value)
