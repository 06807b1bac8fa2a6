"""Decode by a schedule: the simulator in any legal order, and the backends, against dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within, float64
from scheduled import SCALE, dense, make_scheduled

from pallas_kernels.megakernel import decode_by_schedule
from pallas_kernels.megakernel.simulator import legal_order, simulate
from pallas_kernels.schedule import Schedule, schedule

CLOSE = {0.99: 2e-6, 1.0: 1e-5}
EXACT = {1.0: 1e-9}


@pytest.mark.parametrize("queues", [True, False])
def test_simulator_in_any_order(seed, queues):
    @settings(deadline=None, max_examples=15)
    @given(
        st.lists(st.integers(0, 1200), min_size=1, max_size=4),
        st.integers(1, 6),
        st.integers(1, 24),
        st.sampled_from([16, 8]),
        st.integers(0, 1000),
    )
    def check(lengths, tokens, processors, heads, draw):
        rng = np.random.default_rng([seed, draw])
        case = make_scheduled(rng, lengths, tokens, heads)
        plan = schedule(lengths, tokens, processors, heads)
        order = legal_order(plan, rng, queues=queues)
        got = simulate(plan, *case.arrays, scale=SCALE, order=order)
        assert_within(got, dense(case, lengths), EXACT)

    check()


def test_simulator_refuses_an_illegal_order(rng):
    plan = schedule([1000], 2, 4)
    case = make_scheduled(rng, [1000], 2)
    order = legal_order(plan, rng)[::-1]
    with pytest.raises(RuntimeError, match=r"^uid 13\d ran before \d+, on which it depends$"):
        simulate(plan, *case.arrays, scale=SCALE, order=order)


def decode(backend: str, plan: Schedule, lengths, *args):
    """Off a GPU: kernels are interpreted, and processors that wait need the queue of all."""
    out, _ = decode_by_schedule(
        *(plan, *args),
        lengths=lengths,
        queue="global" if backend == "megakernel" else "processors",
        backend=backend,
        interpret=backend != "reference",
    )
    return out


@functools.cache
def jitted(backend: str):
    return jax.jit(functools.partial(decode, backend), compiler_options=QUICK_COMPILE)


class MegakernelSuite:
    """What every backend does."""

    backend: str

    def call(self, plan: Schedule, case, lengths=None):
        if lengths is not None:
            lengths = jnp.asarray(lengths, jnp.int32)
        return jitted(self.backend)(plan, lengths, *case.args, SCALE)

    def check(self, rng, lengths, tokens, processors, heads=16, dtype="float32", close=CLOSE):
        case = make_scheduled(rng, lengths, tokens, heads, dtype=dtype)
        plan = schedule(lengths, tokens, processors, heads)
        out = self.call(plan, case)
        assert out.dtype == case.q_v.dtype
        assert_within(out, dense(case, lengths), close)
        return plan

    @pytest.mark.parametrize(
        ("tokens", "heads"), [(1, 16), (1, 8), (2, 16), (3, 8), (4, 16), (4, 8), (5, 16)]
    )
    def test_tokens(self, rng, tokens, heads):
        """A tree, a direct partial, less keys than tokens, and none."""
        self.check(rng, [1500, 40, tokens - 1, 0, 256], tokens, 20, heads)

    def test_deep_tree(self, rng):
        """Reductions of reductions."""
        plan = self.check(rng, [9000], 1, 60)
        assert plan.bounds is not None
        assert plan.bounds[3] >= 2

    def test_more_than_a_dependency_list_holds(self, rng):
        plan = self.check(rng, [40 * 128], 1, 40, 8)
        lists = plan.dependencies.values()
        assert np.count_nonzero(plan.instructions[..., 0] == 1) == 40
        assert max(map(len, lists)) <= 27

    def test_more_sequences_than_processors(self, rng):
        self.check(rng, rng.integers(1, 600, 9).tolist(), 2, 4)

    def test_fewer_keys_than_processors(self, rng):
        self.check(rng, [90], 3, 132)

    @pytest.mark.parametrize("length", [1, 32, 33, 255, 257, 512])
    def test_edges(self, rng, length):
        self.check(rng, [length], 2, 6)

    @pytest.mark.parametrize(
        ("dtype", "close"),
        [("bfloat16", {0.99: 1e-2, 1.0: 3e-2}), ("float16", {0.99: 1e-3, 1.0: 4e-3})],
    )
    def test_half_precision(self, rng, dtype, close):
        self.check(rng, [1200, 70], 4, 12, dtype=dtype, close=close)

    def test_lengths(self, rng):
        """A plan with room serves shorter sequences: partials are clipped, some to nothing."""
        planned, tokens = [1800, 700, 300, 5], 2
        plan = schedule(planned, tokens, 24)
        for lengths in ([1700, 650, 290, 5], [33, 1, 2, 0], planned):
            case = make_scheduled(rng, lengths, tokens, num_pages=16, max_pages=8)
            out = self.call(plan, case, lengths)
            assert_within(out, dense(case, lengths), CLOSE)
            arrays = case.arrays
            simulated = simulate(plan, *arrays, scale=SCALE, lengths=np.asarray(lengths))
            assert_within(simulated, dense(case, lengths), EXACT)

    def test_outgrown_under_jit(self, rng):
        """What the plan does not cover is NaN; other sequences are as they were."""
        case = make_scheduled(rng, [400, 300], 1, max_pages=4)
        plan = schedule([390, 300], 1, 6)
        out = self.call(plan, case, [400, 300])
        assert np.isnan(out[0]).all()
        assert_within(out[1], dense(case, [400, 300])[1], CLOSE)

    def test_one_compilation_for_like_schedules(self, rng):
        traces = 0

        @jax.jit
        def run(plan, lengths, *args):
            nonlocal traces
            traces += 1
            return decode(self.backend, plan, lengths, *args, SCALE)

        for planned in ([900, 400], [700, 1000], [300, 300]):
            lengths = [length - int(rng.integers(1, 9)) for length in planned]
            case = make_scheduled(rng, lengths, 2, num_pages=12, max_pages=6)
            out = run(schedule(planned, 2, 8), jnp.asarray(lengths, jnp.int32), *case.args)
            assert_within(out, dense(case, lengths), CLOSE)
        assert traces == 1

    def test_without_jit(self, rng):
        case = make_scheduled(rng, [600, 10], 3)
        plan = schedule([600, 10], 3, 8)
        out = decode(self.backend, plan, None, *case.args, SCALE)
        assert_within(out, dense(case, [600, 10]), CLOSE)

    def test_table_order_does_not_matter(self, rng):
        """Processors, and places among no-ops, are the table's business: results are the words'."""
        case = make_scheduled(rng, [3000, 100], 2)
        plan = schedule([3000, 100], 2, 20)
        table = np.array(plan.instructions)[rng.permutation(20)]
        table = np.concatenate([np.zeros_like(table), table], axis=1)
        moved = Schedule(instructions=table, batch=2, new_tokens=2)
        np.testing.assert_array_equal(self.call(moved, case), self.call(plan, case))


class TestReference(MegakernelSuite):
    backend = "reference"


class TestTriton(MegakernelSuite):
    backend = "triton"


class TestMegakernel(MegakernelSuite):
    backend = "megakernel"


def test_shared_and_permuted_pages(rng):
    """Two sequences of the same pages give the same attention."""
    case = make_scheduled(rng, [700, 700], 1)
    table = case.table.at[1].set(case.table[0])
    q_rot, q_v = (jnp.broadcast_to(q[:1], q.shape) for q in (case.q_rot, case.q_v))
    plan = schedule([700, 700], 1, 2)
    out, _ = decode_by_schedule(plan, q_rot, q_v, case.k_rot, case.v, table, SCALE)
    np.testing.assert_array_equal(out[0], out[1])
    assert np.isfinite(float64(out)).all()
