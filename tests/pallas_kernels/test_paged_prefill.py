"""`paged_prefill` against the float64 oracle: one suite for every backend."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, PrefillCase, assert_within, make_prefill, prefill_attention

from pallas_kernels.paged_prefill import paged_prefill

# Bounds on quantiles of the absolute error; values are of the order of 1.
OUT = {
    "float32": {0.99: 2e-6, 1.0: 1e-5},
    "bfloat16": {0.99: 1e-2, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {0.99: 5e-6, 1.0: 2e-5}

few = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)

# Nothing; one of one; queries without keys; a chunk; keys without queries; fewer keys than
# queries; more tokens than a unit of rows has; a whole prompt.
SIZES = [(0, 0), (1, 1), (5, 0), (20, 70), (0, 9), (20, 7), (40, 43), (33, 33)]


@functools.cache
def jitted(**options):
    def run(sm_scale, *args):
        return paged_prefill(*args, sm_scale=sm_scale, **options)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def scale_of(case: PrefillCase) -> float:
    """Scores of order 1."""
    return (case.q_nope.shape[-1] + case.q_pe.shape[-1]) ** -0.5


class PagedPrefillSuite:
    """What every backend does; a subclass names one."""

    backend: str
    interpret: bool

    def call(self, case: PrefillCase, **options):
        run = jitted(backend=self.backend, interpret=self.interpret, **options)
        return run(scale_of(case), *case.args)

    def check(self, case: PrefillCase, **options) -> None:
        """Padding and queries without keys too: the oracle has 0 and -inf there."""
        out, lse = self.call(case, **options)
        want_out, want_lse = prefill_attention(case, scale_of(case))
        assert out.dtype == case.q_nope.dtype
        assert lse.dtype == jnp.float32
        assert_within(out, want_out, OUT[str(out.dtype)])
        assert_within(lse, want_lse, LSE)

    @pytest.mark.parametrize("page_size", [1, 3, 16, 64])
    def test_page_sizes(self, rng, page_size):
        self.check(make_prefill(rng, SIZES, page_size=page_size, heads=3))

    @pytest.mark.parametrize("heads", [1, 5, 16])
    def test_heads(self, rng, heads):
        self.check(
            make_prefill(rng, SIZES, page_size=16, heads=heads, latent=16), deterministic=True
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype):
        self.check(make_prefill(rng, SIZES, page_size=16, heads=3, dtype=dtype))

    @pytest.mark.parametrize(("latent", "rope"), [(16, 0), (256, 32), (512, 64)])
    def test_widths(self, rng, latent, rope):
        self.check(make_prefill(rng, SIZES[3:6], page_size=16, heads=2, latent=latent, rope=rope))

    def test_nothing_cached_and_nothing_asked(self, rng):
        for sizes in ([(0, 0)], [(4, 0), (0, 5)]):
            case = make_prefill(rng, sizes, page_size=16, heads=2, latent=16)
            out, lse = self.call(case)
            np.testing.assert_array_equal(out, np.zeros(out.shape))
            np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    def test_one_query_a_request_is_decode(self, rng):
        """Many requests of one token, as a decode step has."""
        sizes = [(1, int(m)) for m in rng.integers(0, 40, 30)]
        self.check(make_prefill(rng, sizes, page_size=16, heads=2, latent=16))

    def test_max_count(self, rng):
        """A bound that holds, and one beyond the number of tokens."""
        case = make_prefill(rng, SIZES[3:6], page_size=16, heads=2, latent=16)
        for max_count in (20, 1000):
            self.check(case, max_count=max_count)

    @pytest.mark.parametrize("page_size", [1, 16])
    def test_any_sizes(self, page_size):
        """Shapes stay, so that this compiles once; few requests of the three may be empty."""

        @few(max_examples=10)
        @given(
            sizes=st.lists(
                st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=3, max_size=3
            ),
            seed=st.integers(0, 2**32 - 1),
        )
        def check(sizes, seed):
            case = make_prefill(
                np.random.default_rng(seed),
                sizes,
                page_size=page_size,
                heads=3,
                latent=16,
                total=128,
                num_pages=190 // page_size + 8,
                num_ids=190 // page_size + 12,
            )
            self.check(case)

        check()

    def test_garbage_in_traced_values(self, rng):
        """Wrong numbers read some page or none, and write no row twice or outside."""
        case = make_prefill(rng, [(20, 40), (30, 30), (9, 50)], page_size=16, heads=2, latent=16)
        finite = {
            name: jnp.nan_to_num(getattr(case, name))
            for name in ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
        }
        low, high = -(2**31), 2**31 - 1
        for changes in (
            {"start": [-5, high, low]},
            {"length": [-1, low, 500]},
            {"page_ids": rng.choice([low, -1, 0, 3, 10**6, high], len(case.page_ids))},
            {"q_count": [high, -3, 10**6]},
            {"q_count": [low, 40, 9]},
            {"q_start": [0, 10**6, high]},
            {"q_start": [0, 70, 4]},
        ):
            arrays = {name: jnp.asarray(value, jnp.int32) for name, value in changes.items()}
            out, lse = self.call(dataclasses.replace(case, **{**finite, **arrays}))
            assert np.isfinite(out).all(), changes
            assert not np.isnan(lse).any(), changes
            empty = np.isneginf(lse)
            assert not np.asarray(out)[empty].any(), changes


class TestReference(PagedPrefillSuite):
    backend, interpret = "reference", False


class TestTritonInterpreted(PagedPrefillSuite):
    backend, interpret = "triton", True

    def test_deterministic(self, rng):
        """To the bit, whatever the other requests are: none, others, or longer ones."""
        case = make_prefill(rng, [(40, 300), (30, 30), (0, 60)], page_size=16, heads=4, latent=16)
        want = self.call(case, deterministic=True)
        want_out, want_lse = prefill_attention(case, scale_of(case))
        assert_within(want[0], want_out, OUT["float32"])
        assert_within(want[1], want_lse, LSE)
        others = dataclasses.replace(
            case,
            q_count=case.q_count.at[1].set(7),
            length=case.length.at[1].set(11).at[2].set(0),
        )
        arrays = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        for name in ("start", "length", "q_start", "q_count"):
            arrays[name] = arrays[name][:1]
        for name in ("q_nope", "q_pe"):
            arrays[name] = arrays[name][:45]
        alone = PrefillCase(**arrays)
        for got in (self.call(others, deterministic=True), self.call(alone, deterministic=True)):
            for result, expected in zip(got, want, strict=True):
                np.testing.assert_array_equal(result[:40], expected[:40])


@pytest.fixture
def case(rng) -> PrefillCase:
    return make_prefill(rng, [(3, 5), (2, 20)], page_size=16, heads=4)


def ints(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


ERRORS = {
    "q_nope rank": (
        ValueError,
        {"q_nope": jnp.zeros((1, 9, 4, 64))},
        "q_nope: got shape (1, 9, 4, 64), expected [tokens, heads, latent]",
    ),
    "q_nope empty": (
        ValueError,
        {"q_nope": jnp.zeros((0, 4, 64)), "q_pe": jnp.zeros((0, 4, 16))},
        "q_nope: got shape (0, 4, 64), expected no empty axis",
    ),
    "no request": (
        ValueError,
        {name: ints(0) for name in ("start", "length", "q_start", "q_count")},
        "start: got no request, expected at least one",
    ),
    "length": (
        ValueError,
        {"length": ints(3)},
        "length: got shape (3,), expected (2,), one a request",
    ),
    "q_start": (
        ValueError,
        {"q_start": ints(3)},
        "q_start: got shape (3,), expected (2,), one a request",
    ),
    "q_count": (
        ValueError,
        {"q_count": ints(2, 1)},
        "q_count: got shape (2, 1), expected (2,), one a request",
    ),
    "q_start dtype": (
        TypeError,
        {"q_start": jnp.zeros(2)},
        "q_start: got dtype float32, expected int32",
    ),
}


@pytest.mark.parametrize(("error", "changes", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_arrays(case, error, changes, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        paged_prefill(*dataclasses.replace(case, **changes).args, sm_scale=0.1)


@pytest.mark.parametrize("max_count", [0, -1])
def test_bad_max_count(case, max_count):
    text = f"max_count: got {max_count}, expected None or at least 1"
    with pytest.raises(ValueError, match=f"^{text}$"):
        paged_prefill(*case.args, sm_scale=0.1, max_count=max_count)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"latent": 48}, "latent is 48, the Triton lowering needs a power of two from 16"),
        ({"latent": 1024}, "latent is 1024, a tile holds at most 512"),
    ],
)
def test_unsupported_by_triton(rng, sizes, reason):
    case = make_prefill(rng, [(3, 9)], page_size=16, heads=1, **sizes)
    text = f"backend 'triton' cannot run this paged_prefill: {reason}"
    with pytest.raises(NotImplementedError, match=f"^{text}$"):
        paged_prefill(*case.args, sm_scale=0.1, backend="triton", interpret=True)
    out, lse = paged_prefill(*case.args, sm_scale=scale_of(case))
    want_out, want_lse = prefill_attention(case, scale_of(case))
    assert_within(out, want_out, OUT["float32"])
    assert_within(lse, want_lse, LSE)
