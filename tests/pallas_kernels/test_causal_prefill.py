"""`causal_prefill` against a float64 oracle: one suite for both backends, gradients included."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within, float64
from ragged import RaggedCase, attention, dense_loss, make_ragged

from pallas_kernels.causal_prefill import causal_prefill
from pallas_kernels.causal_prefill.tiles import (
    BackwardTiles,
    CausalTiles,
    plan_query_tiles,
    split_width,
)
from pallas_kernels.causal_prefill.triton import causal_prefill_triton

# Bounds on quantiles of the absolute error; values are of the order of 1.
OUT = {
    "float32": {0.99: 2e-6, 1.0: 1e-5},
    "bfloat16": {0.99: 2e-2, 1.0: 5e-2},
    "float16": {0.99: 2e-3, 1.0: 6e-3},
}
LSE = {0.99: 5e-6, 1.0: 2e-5}
# Gradients' bounds, as a share of the gradient's norm.
GRADIENT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def tile(rows: int, keys: int) -> CausalTiles:
    return CausalTiles(rows=rows, keys=keys, num_warps=4, num_stages=2)


def interpreted(tiles: CausalTiles, *args: Any, sm_scale, causal):
    """The kernels in interpret mode, with small tiles so that few rows fill several."""
    run: Callable[..., Any] = causal_prefill_triton
    return run(
        *args,
        jnp.asarray(sm_scale, jnp.float32),
        causal=causal,
        interpret=True,
        tiles=tiles,
        backward_tiles=BackwardTiles(dq=tiles, dkv=tiles),
    )


# Empty requests; a single token; fewer keys than queries; more; lengths at a tile's edge.
RAGGED = [(0, 0), (1, 1), (5, 0), (16, 16), (0, 9), (20, 7), (3, 40), (17, 33), (33, 32), (1, 50)]

few = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)
LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=3)


@functools.cache
def jitted(function: Callable[..., Any], sm_scale: float, causal: bool):
    run = functools.partial(function, sm_scale=sm_scale, causal=causal)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


class CausalPrefillSuite:
    """What every backend does; a subclass gives `function`."""

    function: Callable[..., Any]

    def check(self, case: RaggedCase, *, causal: bool = True) -> None:
        sm_scale = case.q.shape[-1] ** -0.5
        out, lse = jitted(self.function, sm_scale, causal)(*case.args)
        want_out, want_lse = attention(case, sm_scale, causal)
        assert out.dtype == case.q.dtype
        assert lse.dtype == jnp.float32
        assert_within(out, want_out, OUT[str(out.dtype)])
        assert_within(lse, want_lse, LSE)

    def check_gradients(self, rng, case: RaggedCase, *, causal: bool = True) -> None:
        """Of a loss of out and lse; rows in no request hold NaN and get 0."""
        sm_scale = case.q.shape[-1] ** -0.5
        shape = (*case.q.shape[:2], case.v.shape[2])
        weights = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        lse_weights = jnp.asarray(rng.standard_normal(shape[:2]), jnp.float32)
        ranges = case.args[3:]

        def loss(q, k, v):
            out, lse = self.function(q, k, v, *ranges, sm_scale=sm_scale, causal=causal)
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
            return (out.astype(jnp.float32) * weights).sum() + (lse * lse_weights).sum()

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=QUICK_COMPILE)
        dense = functools.partial(dense_loss, case=case, sm_scale=sm_scale, causal=causal)
        exact = jax.jit(jax.grad(dense, argnums=(0, 1, 2)), compiler_options=QUICK_COMPILE)
        want = exact(*(x.astype(jnp.float32) for x in case.args[:3]), weights, lse_weights)
        for got, expected, array in zip(grad(*case.args[:3]), want, case.args[:3], strict=True):
            assert got.dtype == array.dtype
            got, expected = float64(got), float64(expected)
            bound = GRADIENT[str(array.dtype)] * max(np.linalg.norm(expected), 1.0)
            assert np.linalg.norm(got - expected) <= bound
            unused = np.isnan(float64(array)).any(axis=(1, 2))
            np.testing.assert_array_equal(got[unused], 0.0)

    @pytest.mark.parametrize("causal", [True, False])
    def test_ragged(self, rng, causal):
        case = make_ragged(rng, RAGGED)
        self.check(case, causal=causal)
        self.check_gradients(rng, case, causal=causal)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype):
        case = make_ragged(rng, RAGGED[3:], dtype=dtype)
        self.check(case)
        self.check_gradients(rng, case)

    @pytest.mark.parametrize(
        ("heads", "width", "value_width"), [(1, 16, 32), (3, 48, 16), (1, 96, 64), (1, 192, 128)]
    )
    def test_widths(self, rng, heads, width, value_width):
        case = make_ragged(
            rng, [(6, 0), (20, 37), (9, 5)], heads=heads, width=width, value_width=value_width
        )
        self.check(case)
        self.check_gradients(rng, case)

    @given(lengths=LENGTHS, causal=st.booleans(), seed=st.integers(0, 2**32 - 1))
    @few(max_examples=6)
    def test_any_lengths(self, lengths, causal, seed):
        """Shapes stay the same, so that examples compile once."""
        rng = np.random.default_rng(seed)
        case = make_ragged(rng, lengths, heads=1, width=16, tokens=140, keys=140)
        out, lse = jitted(self.function, 0.25, causal)(*case.args)
        want_out, want_lse = attention(case, 0.25, causal)
        assert_within(out, want_out, OUT["float32"])
        assert_within(lse, want_lse, LSE)

    def test_shared_keys(self, rng):
        """Requests that read the same keys: their gradients add up."""
        case = make_ragged(rng, [(7, 30), (20, 30), (4, 30)])
        start = case.kv_start[0] + jnp.array([0, 0, 5], jnp.int32)
        count = jnp.array([30, 21, 19], jnp.int32)
        case = dataclasses.replace(case, kv_start=start, kv_count=count)
        self.check(case)

        # Only rows that no request reads are expected to be NaN.
        used = np.zeros(case.k.shape[0], bool)
        used[int(start[0]) : int(start[0]) + 30] = True
        hide = functools.partial(jnp.where, used[:, None, None])
        nan = jnp.float32(np.nan)
        case = dataclasses.replace(case, k=hide(case.k, nan), v=hide(case.v, nan))
        self.check_gradients(rng, case)

    def test_large_scores(self, rng):
        """Scores of hundreds: the running maximum keeps exponentials in range."""
        case = make_ragged(rng, [(40, 60), (3, 2)])
        out, lse = jitted(self.function, 20.0, True)(*case.args)
        want_out, want_lse = attention(case, 20.0, True)
        assert np.abs(want_lse[np.isfinite(want_lse)]).max() > 200
        assert_within(out, want_out, {0.99: 2e-3, 1.0: 1e-2})
        assert_within(lse, want_lse, {1.0: 2e-3})

    def test_nothing_to_see(self, rng):
        case = make_ragged(rng, [(0, 0), (5, 0)])
        out, lse = jitted(self.function, 1.0, True)(*case.args)
        np.testing.assert_array_equal(out, np.zeros(out.shape))
        np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    def test_scan_compiles_once(self, rng):
        """Lengths and the scale are values: one program serves all of them, in a loop too."""
        draws = ([(5, 5), (0, 3), (20, 31)], [(33, 40), (7, 2), (1, 1)], [(0, 0), (0, 0), (50, 50)])
        cases = [make_ragged(rng, lengths, tokens=64, keys=90) for lengths in draws]
        scales = [0.1, 0.2, 0.4]
        traces = 0

        def step(carry, xs):
            nonlocal traces
            traces += 1
            sm_scale, args = xs
            return carry, self.function(*args, sm_scale=sm_scale, causal=True)

        @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        def run(scales, stacked):
            return jax.lax.scan(step, jnp.int32(0), (scales, stacked))[1]

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(case.args for case in cases))
        outs, lses = run(jnp.asarray(scales, jnp.float32), stacked)
        for case, sm_scale, out, lse in zip(cases, scales, outs, lses, strict=True):
            want_out, want_lse = attention(case, sm_scale, True)
            assert_within(out, want_out, OUT["float32"])
            assert_within(lse, want_lse, LSE)
        before = traces
        run(jnp.asarray(scales[::-1], jnp.float32), jax.tree.map(lambda x: x[::-1], stacked))
        assert traces == before


class TestReference(CausalPrefillSuite):
    function = staticmethod(functools.partial(causal_prefill, backend="reference"))

    def test_blocks_of_queries(self, rng, monkeypatch):
        """More scores than one step may hold."""
        module = "pallas_kernels.causal_prefill.reference.SCORES_PER_STEP"
        monkeypatch.setattr(module, 1 << 12)
        case = make_ragged(rng, RAGGED)
        self.check(case)
        self.check_gradients(rng, case)


class TestTriton(CausalPrefillSuite):
    function = staticmethod(functools.partial(interpreted, tile(16, 16)))

    @pytest.mark.parametrize(("rows", "keys"), [(32, 16), (16, 32), (64, 64)])
    def test_tiles(self, rng, rows, keys):
        suite = CausalPrefillSuite()
        suite.function = functools.partial(interpreted, tile(rows, keys))
        case = make_ragged(rng, RAGGED[5:])
        suite.check(case)
        suite.check_gradients(rng, case)

    @pytest.mark.parametrize("causal", [True, False])
    def test_every_alignment(self, rng, causal):
        """Where a tile's keys stop being seen by all of its queries: every remainder, exactly."""

        def results(function, q, k, v, *ranges):
            def both(q, k, v):
                out, lse = function(q, k, v, *ranges, sm_scale=0.3, causal=causal)
                return out, jnp.where(jnp.isneginf(lse), 0.0, lse)

            results, vjp = jax.vjp(both, q, k, v)
            return *results, *vjp(jax.tree.map(jnp.cos, results))

        ours, reference = (
            jax.jit(functools.partial(results, suite.function), compiler_options=QUICK_COMPILE)
            for suite in (TestTriton, TestReference)
        )
        for m in range(30, 46):
            case = make_ragged(rng, [(20, m)], heads=1, width=16, tokens=28, keys=56)
            for got, want in zip(ours(*case.args), reference(*case.args), strict=True):
                assert_within(got, float64(want), {1.0: 2e-5})

    def test_chosen_tiles(self, rng):
        """Through the entry, without jit."""
        case = make_ragged(rng, [(3, 9), (70, 70)])
        out, lse = causal_prefill(*case.args, sm_scale=0.2, backend="triton", interpret=True)
        want_out, want_lse = attention(case, 0.2, True)
        assert_within(out, want_out, OUT["float32"])
        assert_within(lse, want_lse, LSE)

    def test_scale_is_a_constant(self, rng):
        case = make_ragged(rng, [(3, 9)])

        def loss(sm_scale):
            return self.function(*case.args, sm_scale=sm_scale, causal=True)[0].sum()

        assert jax.grad(loss)(jnp.float32(0.3)) == 0


@given(
    lengths=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=5),
    rows=st.sampled_from([16, 32]),
)
@few(max_examples=15)
def test_every_row_has_one_tile(lengths, rows):
    """Each row is owned once, and a tile's queries are of one request."""
    count, gap = np.asarray(lengths).T
    start = np.cumsum(gap + np.append(0, count[:-1]))
    tokens = int(start[-1] + count[-1] + 3)
    ranges_of = list(zip(start.tolist(), count.tolist(), strict=True))
    ranges = [jnp.asarray(x, jnp.int32) for x in (start, count, start, count)]
    plan = plan_query_tiles(*ranges, tokens=tokens, rows=rows, causal=True)
    owner = np.zeros(tokens, int)
    for first, stop, query_stop in zip(plan.first, plan.stop, plan.query_stop, strict=True):
        owner[int(first) : int(stop)] += 1
        queries = range(int(first), int(query_stop))
        assert sum(a <= i < a + c for a, c in ranges_of for i in queries) == len(queries)
        assert len({a for a, c in ranges_of for i in queries if a <= i < a + c}) <= 1
    np.testing.assert_array_equal(owner, 1)


def test_split_width():
    widths = (8, 16, 24, 32, 48, 96, 112, 136, 192, 256, 320)
    splits = [split_width(width) for width in widths]
    assert splits == [
        *(None, (16,), None, (32,), (32, 16), (64, 32), None, None, (128, 64), (256,), (256, 64))
    ]


BAD = {
    "q": (ValueError, "q: got shape", lambda c: {"q": c.q[0]}),
    "k heads": (ValueError, "k: got shape", lambda c: {"k": c.k[:, :1]}),
    "k width": (ValueError, "k: got shape", lambda c: {"k": c.k[..., :16]}),
    "v keys": (ValueError, "v: got shape", lambda c: {"v": c.v[:-1]}),
    "v empty": (ValueError, "v: got shape", lambda c: {"v": c.v[..., :0]}),
    "count": (ValueError, "q_count: got shape", lambda c: {"q_count": c.q_count[:-1]}),
    "no request": (ValueError, "q_start: got shape", lambda c: {"q_start": c.q_start[:0]}),
    "integers": (
        TypeError,
        "kv_start: got dtype",
        lambda c: {"kv_start": c.kv_start.astype(float)},
    ),
    "q dtype": (TypeError, "q: got dtype", lambda c: {"q": c.q.astype(jnp.int32)}),
    "v dtype": (TypeError, "v: got dtype", lambda c: {"v": c.v.astype(jnp.bfloat16)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(rng, name):
    error, message, change = BAD[name]
    case = make_ragged(rng, [(3, 4), (2, 2)])
    changed = dataclasses.replace(case, **change(case))
    with pytest.raises(error, match=message):
        causal_prefill(*changed.args, sm_scale=0.1)


def test_bad_scale(rng):
    with pytest.raises(ValueError, match="sm_scale: got -1"):
        causal_prefill(*make_ragged(rng, [(3, 4)]).args, sm_scale=-1)


@pytest.mark.parametrize(
    ("width", "value_width", "reason"),
    [(40, 16, "head width is 40"), (512, 16, "head width is 512"), (32, 48, "value width is 48")],
)
def test_unsupported_widths(rng, width, value_width, reason):
    """Triton says why; the reference takes any."""
    case = make_ragged(rng, [(3, 4)], width=width, value_width=value_width)
    with pytest.raises(NotImplementedError, match=reason):
        causal_prefill(*case.args, sm_scale=0.1, backend="triton")
    want, _ = attention(case, 0.1, True)
    assert_within(causal_prefill(*case.args, sm_scale=0.1)[0], want, OUT["float32"])


def test_unknown_backend(rng):
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        causal_prefill(*make_ragged(rng, [(3, 4)]).args, sm_scale=0.1, backend="cuda")
