"""`token_sparse` against the float64 oracle: one suite for every backend."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within
from token_lists import LSE, OUT, ListCase, attend_lists, make_lists

from pallas_kernels.paged_decode import triton as decode_kernel
from pallas_kernels.token_sparse import token_sparse

# Nothing; one; around a tile of keys; about a third of a list; nearly all; all of it.
COUNTS = (0, 1, 63, 64, 65, 40, 127, 128)

few = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)


@functools.cache
def jitted(**options):
    def run(sm_scale, *args):
        return token_sparse(*args, sm_scale=sm_scale, **options)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def scale_of(case: ListCase) -> float:
    """Scores of order 1."""
    return (case.q_nope.shape[-1] + case.q_pe.shape[-1]) ** -0.5


class TokenSparseSuite:
    """What every backend does; a subclass names one."""

    backend: str
    interpret: bool

    def call(self, case: ListCase, **options):
        run = jitted(backend=self.backend, interpret=self.interpret, **options)
        return run(scale_of(case), *case.args)

    def check(self, case: ListCase, **options) -> None:
        """Queries without keys too: the oracle has 0 and -inf there."""
        out, lse = self.call(case, **options)
        want_out, want_lse = attend_lists(case, scale_of(case))
        assert out.dtype == case.q_nope.dtype
        assert lse.dtype == jnp.float32
        assert_within(out, want_out, OUT[str(out.dtype)])
        assert_within(lse, want_lse, LSE)

    @pytest.mark.parametrize(("page_size", "gaps"), [(1, True), (3, False), (64, True)])
    def test_page_sizes(self, rng, page_size, gaps):
        self.check(make_lists(rng, COUNTS, heads=3, page_size=page_size, gaps=gaps))

    @pytest.mark.parametrize("heads", [1, 16, 20, 70, 128])
    def test_heads(self, rng, heads):
        """A tile of rows, one that masks every step, several, the last one short."""
        self.check(make_lists(rng, (40, 128, 0, 3), heads=heads, latent=16, dtype="bfloat16"))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype):
        self.check(make_lists(rng, COUNTS, heads=5, dtype=dtype))

    @pytest.mark.parametrize(("latent", "rope"), [(16, 0), (256, 32), (512, 64)])
    def test_widths(self, rng, latent, rope):
        self.check(make_lists(rng, (70, 0), heads=2, topk=128, latent=latent, rope=rope))

    def test_longest_lists(self, rng):
        self.check(make_lists(rng, (2048, 700, 2047), heads=2, topk=2048, latent=16))

    @pytest.mark.parametrize("options", [{"num_splits": 3}, {"deterministic": True}])
    def test_options(self, rng, options):
        """Splits of which some hold no key."""
        counts = (2, 700, 0, 512, 65, 1024)
        for gaps in (False, True):
            case = make_lists(rng, counts, heads=2, topk=1024, latent=16, gaps=gaps)
            self.check(case, **options)

    def test_no_query_has_a_key(self, rng):
        out, lse = self.call(make_lists(rng, (0, 0), heads=2, latent=16))
        np.testing.assert_array_equal(out, np.zeros(out.shape))
        np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    def test_whatever_is_outside_the_pool_is_no_key(self, rng):
        """Traced: before, between and behind the keys; NaN stands at both of the pool's ends."""
        case = make_lists(rng, (128,), heads=2, page_size=64, latent=16, num_pages=4)
        outside = np.array([-(2**31), -2, 256, 257, 2**31 - 1, 128 * 64, -64], np.int32)
        places = np.concatenate([[0, 127], rng.permutation(np.arange(1, 127))[:38]])
        indices = np.asarray(case.indices).copy()
        indices[0, places] = rng.choice(outside, 40)
        nan = jnp.full(16, jnp.nan)
        pools = [pool.at[0, 0].set(nan).at[3, 63].set(nan) for pool in case.args[2:4]]
        indices = np.where((indices == 0) | (indices == 255), 256, indices)
        self.check(
            ListCase(
                q_nope=case.q_nope,
                q_pe=case.q_pe,
                ckv_cache=pools[0],
                kpe_cache=pools[1],
                indices=jnp.asarray(indices),
            )
        )

    def test_a_token_listed_twice_counts_twice(self, rng):
        case = make_lists(rng, (30, 64), heads=2, topk=64, latent=16)
        doubled = jnp.concatenate([case.indices, case.indices], axis=1)
        out, lse = self.call(dataclasses.replace(case, indices=doubled))
        once_out, once_lse = attend_lists(case, scale_of(case))
        assert_within(out, once_out, OUT["float32"])
        assert_within(lse, once_lse + 1, LSE)

    def test_any_lists(self):
        """Shapes stay, so that this compiles once."""

        @few(max_examples=10)
        @given(
            counts=st.lists(st.integers(0, 128), min_size=4, max_size=4),
            gaps=st.booleans(),
            seed=st.integers(0, 2**32 - 1),
        )
        def check(counts, gaps, seed):
            rng = np.random.default_rng(seed)
            self.check(make_lists(rng, counts, heads=3, gaps=gaps, latent=16, num_pages=9))

        check()


class TestReference(TokenSparseSuite):
    backend, interpret = "reference", False

    def test_sizes_of_no_kernel(self, rng):
        self.check(make_lists(rng, COUNTS, heads=2, latent=20, rope=6, page_size=5))

    def test_more_queries_than_a_step_has(self, rng):
        counts = tuple(rng.integers(0, 64, 40).tolist())
        self.check(make_lists(rng, counts, heads=2, topk=64, latent=16))

    def test_gradient(self, rng):
        """By finite differences, in a query and in a listed token; queries without keys have 0."""
        case = make_lists(rng, (20, 0), heads=2, topk=64, latent=16)
        token = int(case.indices.max())
        page, offset = divmod(token, 16)

        def loss(q_nope, row):
            pool = jnp.nan_to_num(case.ckv_cache).at[page, offset].set(row)
            args = (q_nope, case.q_pe, pool, jnp.nan_to_num(case.kpe_cache), case.indices)
            out, lse = token_sparse(*args, sm_scale=0.2, backend="reference")
            return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

        at = case.q_nope, case.ckv_cache[page, offset]
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(*at)
        np.testing.assert_array_equal(gradient[0][1], np.zeros((2, 16)))
        way = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in at]
        step = 1e-2
        ahead, behind = (
            loss(*(x + s * w for x, w in zip(at, way, strict=True))) for s in (step, -step)
        )
        slope = sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))
        assert abs((ahead - behind) / (2 * step) - slope) <= 2e-3 * max(1.0, abs(slope))


class TestTritonInterpreted(TokenSparseSuite):
    backend, interpret = "triton", True

    def test_deterministic_ignores_the_rest_of_the_batch(self, rng):
        """A query's bits are the same alone, and among others in any order."""
        case = make_lists(rng, (5, 1024, 700, 0, 64), heads=2, topk=1024, latent=16)
        out, lse = self.call(case, deterministic=True)
        for chosen in ([1], [4, 3, 2, 1, 0]):
            some = self.call(case.queries(chosen), deterministic=True)
            np.testing.assert_array_equal(some[0], out[np.asarray(chosen)])
            np.testing.assert_array_equal(some[1], lse[np.asarray(chosen)])

    def test_keys_behind_the_last_one_cost_nothing(self, rng, monkeypatch):
        """Each query is as many steps as its last key asks for, wherever its gaps are."""
        seen = []

        def noted(length, *args, **options):
            jax.debug.callback(seen.append, length)
            return plan_splits(length, *args, **options)

        plan_splits = decode_kernel.plan_splits
        monkeypatch.setattr(decode_kernel, "plan_splits", noted)
        case = make_lists(rng, (3, 0, 64), heads=2, gaps=False, latent=16)
        indices = case.indices.at[0, 90].set(case.indices[0, 0])
        jitted.cache_clear()
        self.check(dataclasses.replace(case, indices=indices))
        jax.effects_barrier()
        [length] = seen
        assert length.tolist() == [91, 0, 64]


REFUSED = [
    ({"indices": jnp.zeros((3, 64), jnp.int32)}, r"indices: got shape \(3, 64\), expected \[2, t"),
    ({"indices": jnp.zeros(64, jnp.int32)}, r"indices: got shape \(64,\), expected \[2, topk\]"),
    ({"indices": jnp.zeros((2, 100), jnp.int32)}, "indices: got 100 a query, expected a multiple"),
    ({"indices": jnp.zeros((2, 2112), jnp.int32)}, "indices: got 2112 a query, expected a multipl"),
    ({"indices": jnp.zeros((2, 0), jnp.int32)}, "indices: got 0 a query, expected a multiple of"),
    ({"q_pe": jnp.ones((2, 2, 8))}, r"kpe_cache: got shape \(2, 16, 16\), expected \(2, 16, 8\)"),
    ({"ckv_cache": jnp.ones((2, 16, 8))}, r"ckv_cache: got shape \(2, 16, 8\), expected a last"),
    ({"num_splits": 0}, "num_splits: got 0, expected None or at least 1"),
    ({"backend": "cuda"}, "backend: got 'cuda', expected None or one of"),
]
REFUSED_TYPES = [
    ({"indices": jnp.zeros((2, 64))}, "indices: got dtype float32, expected int32"),
    ({"q_pe": jnp.ones((2, 2, 16), "bfloat16")}, "q_pe: got dtype bfloat16, expected float32"),
]
NOT_IMPLEMENTED = [
    (
        {"backend": "mosaic_gpu", "q_pe": jnp.ones((2, 2, 0)), "kpe_cache": jnp.ones((2, 16, 0))},
        "backend 'mosaic_gpu' cannot run this token_sparse: there are no rope columns, with which",
    ),
    (
        {
            "backend": "triton",
            "q_nope": jnp.ones((2, 2, 48)),
            "ckv_cache": jnp.ones((2, 16, 48)),
        },
        "backend 'triton' cannot run this token_sparse: latent is 48, the Triton lowering needs",
    ),
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(ValueError, *row) for row in REFUSED]
    + [(TypeError, *row) for row in REFUSED_TYPES]
    + [(NotImplementedError, *row) for row in NOT_IMPLEMENTED],
)
def test_refusals(rng, error, change, message):
    """One line, with the argument, what came and what was expected."""
    case = make_lists(rng, (20, 3), heads=2, topk=64, latent=16)
    names = (field.name for field in dataclasses.fields(case))
    args = dict(zip(names, case.args, strict=True), sm_scale=0.1)
    with pytest.raises(error, match=f"^{message}") as refusal:
        token_sparse(**args | change)
    assert "\n" not in str(refusal.value)


def test_the_kernel_refuses_gradients(rng):
    case = make_lists(rng, (3,), heads=2, topk=64, latent=16)

    def loss(q_nope):
        args = dataclasses.replace(case, q_nope=q_nope).args
        return token_sparse(*args, sm_scale=0.07, backend="triton", interpret=True)[1].sum()

    loss = jax.jit(loss, compiler_options=QUICK_COMPILE)

    with pytest.raises(NotImplementedError, match=re.escape("token_sparse: the Pallas backends")):
        jax.grad(loss)(case.q_nope)
    loss(case.q_nope)  # it is the gradient that is refused
