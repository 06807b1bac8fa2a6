"""`paged_decode` against the float64 oracle: one suite for every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_mla_tolerance import SM_SCALE, assert_flash_mla, draw, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import GARBAGE, QUICK_COMPILE, PagedCase, assert_within, make_paged, paged_attention

from pallas_kernels.paged_decode import paged_decode

# Bounds on quantiles of the absolute error; values are of the order of 1.
OUT = {
    "float32": {0.99: 2e-6, 1.0: 1e-5},
    "bfloat16": {0.99: 1e-2, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {0.99: 5e-6, 1.0: 2e-5}

# Properties are methods of the suite, so that each backend's subclass executes them.
few = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)
SEEDS = st.integers(0, 2**32 - 1)


def ragged(page_size: int) -> tuple[int, ...]:
    """Empty, one token, a full page, one more, and several pages."""
    return 0, 1, page_size, page_size + 1, 3 * page_size - 2


@functools.cache
def jitted(backend: str, interpret: bool, num_splits: int | None):
    def run(sm_scale, *args):
        return paged_decode(
            *args, sm_scale=sm_scale, num_splits=num_splits, backend=backend, interpret=interpret
        )

    return jax.jit(run, compiler_options=QUICK_COMPILE)


class PagedDecodeSuite:
    """What every backend does; a subclass names one."""

    backend: str
    interpret: bool

    def call(self, case: PagedCase, sm_scale: float, num_splits: int | None = 1):
        return jitted(self.backend, self.interpret, num_splits)(sm_scale, *case.args)

    def check(self, case: PagedCase, num_splits: int | None = 1) -> None:
        sm_scale = (case.q_nope.shape[-1] + case.q_pe.shape[-1]) ** -0.5  # scores of order 1
        out, lse = self.call(case, sm_scale, num_splits)
        want_out, want_lse = paged_attention(case, sm_scale)
        assert out.dtype == case.q_nope.dtype
        assert lse.dtype == jnp.float32
        assert_within(out, want_out, OUT[str(out.dtype)])
        assert_within(lse, want_lse, LSE)

    @pytest.mark.parametrize("page_size", [1, 3, 16, 32, 64, 128, 256])
    def test_page_sizes(self, rng, page_size):
        case = make_paged(rng, lengths=ragged(page_size), page_size=page_size, heads=8)
        self.check(case, num_splits=3)

    @pytest.mark.parametrize("heads", [1, 16, 40, 128])
    def test_heads(self, rng, heads):
        """Split as the lengths and the cores ask for."""
        self.check(make_paged(rng, lengths=(0, 70, 5), page_size=32, heads=heads), num_splits=None)

    @pytest.mark.parametrize(("page_size", "tokens"), [(3, 1), (64, 3)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype, page_size, tokens):
        """One block of rows, and more, which have other tiles."""
        lengths = (*ragged(page_size), 200)
        case = make_paged(
            rng, lengths=lengths, page_size=page_size, heads=15, tokens=tokens, dtype=dtype
        )
        self.check(case, num_splits=2)

    @pytest.mark.parametrize("tokens", [2, 3, 5, 8])
    def test_query_tokens(self, rng, tokens):
        """Lengths below `tokens`, whose first queries see no key, and a full last tile of keys."""
        lengths = (0, 1, tokens - 1, tokens, tokens + 1, 45, 64)
        self.check(make_paged(rng, lengths=lengths, page_size=16, heads=5, tokens=tokens))

    @pytest.mark.parametrize("num_splits", [1, 3, 8, None])
    def test_splits(self, rng, num_splits):
        """More splits than blocks of keys too: the rest of them are empty."""
        case = make_paged(rng, lengths=(0, 1, 33, 200), page_size=16, heads=8)
        self.check(case, num_splits=num_splits)

    @pytest.mark.parametrize(("latent", "rope"), [(16, 0), (64, 64), (256, 32), (512, 64)])
    def test_widths(self, rng, latent, rope):
        self.check(
            make_paged(rng, lengths=(0, 17, 65), page_size=64, heads=8, latent=latent, rope=rope)
        )

    def test_large_scores(self, rng):
        """Scores of hundreds: the running maximum keeps exponentials in range."""
        case = make_paged(rng, lengths=(100, 7), page_size=16, heads=8)
        out, lse = self.call(case, 20.0)
        want_out, want_lse = paged_attention(case, 20.0)
        assert np.abs(want_lse).max() > 200
        assert_within(out, want_out, {0.99: 2e-3, 1.0: 1e-2})
        assert_within(lse, want_lse, {1.0: 2e-3})

    def test_nothing_cached(self, rng):
        case = make_paged(rng, lengths=(0, 0), page_size=16, heads=3)
        out, lse = self.call(case, 0.1)
        np.testing.assert_array_equal(out, np.zeros(out.shape))
        np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    def test_without_jit(self, rng):
        case = make_paged(rng, lengths=(20, 0), page_size=16, heads=2)
        out, lse = paged_decode(
            *case.args, sm_scale=0.3, num_splits=1, backend=self.backend, interpret=self.interpret
        )
        want_out, want_lse = paged_attention(case, 0.3)
        assert_within(out, want_out, OUT["float32"])
        assert_within(lse, want_lse, LSE)

    def test_block_table(self, rng):
        """The adapter that the docstring promises: ids = table.ravel(), start = b * max_pages."""
        case = make_paged(rng, lengths=(40, 0, 16), page_size=16, heads=4)
        table = np.full((3, 4), -1, np.int32)
        for row, start, length in zip(table, case.start, (40, 0, 16), strict=True):
            count = -(-length // 16)
            row[:count] = np.asarray(case.page_ids)[int(start) :][:count]
        self.check(
            dataclasses.replace(
                case, page_ids=jnp.asarray(table.ravel()), start=jnp.arange(3, dtype=jnp.int32) * 4
            )
        )

    def test_compiles_once(self, rng):
        """Lengths, tables and the scale are values: one compilation serves all of them."""
        traces = 0

        @jax.jit
        def run(sm_scale, *args):
            nonlocal traces
            traces += 1
            return paged_decode(
                *args, sm_scale=sm_scale, backend=self.backend, interpret=self.interpret
            )

        for lengths, sm_scale in (((0, 0), 0.1), ((1, 40), 0.1), ((200, 16), 0.2), ((17, 5), 0.3)):
            case = make_paged(rng, lengths=lengths, page_size=16, heads=4, num_pages=30, num_ids=40)
            out, lse = run(sm_scale, *case.args)
            want_out, want_lse = paged_attention(case, sm_scale)
            assert_within(out, want_out, OUT["float32"])
            assert_within(lse, want_lse, LSE)
        assert traces == 1

    def test_in_scan(self, rng):
        """Growing lengths in a compiled loop."""
        case = make_paged(rng, lengths=(70, 35), page_size=16, heads=4)
        lengths = jnp.asarray([[0, 0], [16, 17], [69, 1], [70, 35]], jnp.int32)

        @jax.jit
        def loop(lengths):
            def step(total, length):
                out, lse = paged_decode(
                    *dataclasses.replace(case, length=length).args,
                    sm_scale=0.25,
                    num_splits=2,
                    backend=self.backend,
                    interpret=self.interpret,
                )
                return total + length.sum(), (out, lse)

            return jax.lax.scan(step, jnp.int32(0), lengths)

        _, (outs, lses) = loop(lengths)
        for length, out, lse in zip(lengths, outs, lses, strict=True):
            want_out, want_lse = paged_attention(dataclasses.replace(case, length=length), 0.25)
            assert_within(out, want_out, OUT["float32"])
            assert_within(lse, want_lse, LSE)

    def test_ids_out_of_range(self, rng):
        """Those of used pages too: the nearest page of the pool is read instead."""
        case = make_paged(rng, lengths=(0, 70, 33, 9), page_size=16, heads=3)
        finite = [jnp.nan_to_num(pool) for pool in (case.ckv_cache, case.kpe_cache)]
        case = dataclasses.replace(case, ckv_cache=finite[0], kpe_cache=finite[1])
        replaced = rng.random(len(case.page_ids)) < 0.5
        ids = np.where(replaced, rng.choice(GARBAGE, replaced.size), np.asarray(case.page_ids))
        inside = np.clip(ids, 0, len(finite[0]) - 1)
        sm_scale = 0.1
        out, lse = self.call(
            dataclasses.replace(case, page_ids=jnp.asarray(ids, jnp.int32)), sm_scale
        )
        want_out, want_lse = paged_attention(
            dataclasses.replace(case, page_ids=jnp.asarray(inside, jnp.int32)), sm_scale
        )
        assert_within(out, want_out, OUT["float32"])
        assert_within(lse, want_lse, LSE)

    def check_finite(self, case: PagedCase, num_splits: int | None, empty: list[bool]) -> None:
        """`case` over finite pools: requests are `empty` or not, and nothing is NaN."""
        finite = {name: jnp.nan_to_num(getattr(case, name)) for name in ("ckv_cache", "kpe_cache")}
        out, lse = self.call(dataclasses.replace(case, **finite), 0.1, num_splits)
        assert np.isfinite(out).all()
        assert not np.isnan(lse).any()
        np.testing.assert_array_equal(np.isneginf(lse[:, 0, 0]), empty)

    @pytest.mark.parametrize("num_splits", [3, None])
    def test_garbage_in_traced_values(self, rng, num_splits):
        """A start or a length that leads out of the ids reads some page, or none."""
        case = make_paged(rng, lengths=(40, 30, 20, 10, 50, 60), page_size=16, heads=3)
        start = jnp.asarray([-5, 2**31 - 1, -(2**31), 0, 3, 1000], jnp.int32)
        length = jnp.asarray([40, 30, 20, -1, -(2**31), 60], jnp.int32)
        changed = dataclasses.replace(case, start=start, length=length)
        self.check_finite(changed, num_splits, [False, False, False, True, True, False])

    def test_longer_than_the_ids(self, rng):
        """Lengths that the ids cannot hold read some pages."""
        case = make_paged(rng, lengths=(5, 3, 0), page_size=1, heads=3)
        changed = dataclasses.replace(case, length=jnp.asarray([500, 900, 0], jnp.int32))
        self.check_finite(changed, None, [False, False, True])

    @pytest.mark.parametrize("page_size", [1, 3, 16, 64])
    def test_any_lengths(self, page_size):
        """Shapes stay, so that this compiles once: lengths, page order, ids and contents vary."""

        @few(max_examples=10)
        @given(lengths=st.tuples(*[st.integers(0, 96)] * 3), seed=SEEDS)
        def check(lengths, seed):
            case = make_paged(
                np.random.default_rng(seed),
                lengths=lengths,
                page_size=page_size,
                heads=3,
                tokens=2,
                num_pages=300 // page_size + 8,
                num_ids=300 // page_size + 14,
            )
            self.check(case, num_splits=None)

        check()

    @few(max_examples=6)
    @given(
        lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
        page_size=st.sampled_from([1, 3, 16, 32, 64, 128, 256]),
        heads=st.sampled_from([1, 2, 4, 5, 8, 16, 20, 32, 64]),
        tokens=st.integers(1, 8),
        rope=st.sampled_from([0, 16]),
        num_splits=st.sampled_from([1, 2, 5, None]),
        seed=SEEDS,
    )
    def test_any_shapes(self, lengths, page_size, heads, tokens, rope, num_splits, seed):
        case = make_paged(
            np.random.default_rng(seed),
            lengths=tuple(lengths),
            page_size=page_size,
            heads=heads,
            tokens=tokens,
            rope=rope,
        )
        self.check(case, num_splits=num_splits)


class TestReference(PagedDecodeSuite):
    backend, interpret = "reference", False

    @pytest.mark.parametrize(("latent", "rope", "page_size"), [(48, 24, 16), (20, 6, 5), (8, 2, 1)])
    def test_sizes_of_no_kernel(self, rng, latent, rope, page_size):
        lengths = ragged(page_size)
        self.check(
            make_paged(rng, lengths=lengths, page_size=page_size, heads=2, latent=latent, rope=rope)
        )

    def test_longer_than_a_step(self, rng):
        """Requests over several of its blocks of keys."""
        self.check(make_paged(rng, lengths=(256, 257, 700, 3), page_size=64, heads=2, tokens=2))


class TestTritonInterpreted(PagedDecodeSuite):
    backend, interpret = "triton", True

    @pytest.mark.parametrize(("heads", "tokens"), [(3, 1), (128, 5)])
    def test_deterministic(self, rng, heads, tokens):
        """To the bit, whatever else is in the batch: requests that are split, and more rows than
        the merge takes in its usual way, where the batch has them and a request has not."""

        @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        def run(*args):
            options = {"backend": "triton", "interpret": True, "deterministic": True}
            return paged_decode(*args, sm_scale=0.3, **options)

        drawn = tuple(rng.integers(300, 900, 2).tolist())
        case = make_paged(
            rng,
            lengths=(*drawn, 0, 17),
            page_size=16,
            heads=heads,
            tokens=tokens,
            latent=16,
            rope=0,
        )
        want = run(*case.args)
        want_out, want_lse = paged_attention(case, 0.3)
        assert_within(want[0], want_out, OUT["float32"])
        assert_within(want[1], want_lse, LSE)

        def same(chosen, **changes) -> None:
            fields = ("q_nope", "q_pe", "start", "length")
            picked = {name: getattr(case, name)[np.asarray(chosen)] for name in fields}
            got = run(*dataclasses.replace(case, **{**picked, **changes}).args)
            kept = np.asarray(picked["length"] == changes.get("length", picked["length"]))
            for result, expected in zip(got, want, strict=True):
                expected = np.asarray(expected)[np.asarray(chosen)]
                np.testing.assert_array_equal(np.asarray(result)[kept], expected[kept])

        same(rng.permutation(4))
        same([3, 0, 2, 1], length=jnp.asarray([17, drawn[0], 0, 200], jnp.int32))
        same([1, 0, 2, 3], length=jnp.asarray([drawn[1], 0, 0, 1], jnp.int32))
        # Other shapes: each of the two long ones alone, under a longer vector of ids.
        wider = jnp.concatenate([case.page_ids, jnp.full(100, -7, jnp.int32)])
        for request in (0, 1):
            same([request], page_ids=wider)


@pytest.mark.parametrize("heads", [1, 3, 9])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (2, 1)])
def test_flash_mla_grid(seed, batch, tokens, heads):
    """A corner of FlashMLA's grid at its tolerances; the whole of it runs on a GPU."""
    for keys in (20, 140):
        lengths = np.full(batch, keys)
        case, unpaged = draw(seed, lengths, tokens=tokens, heads=heads, most_keys=192)
        out, lse = jitted("triton", True, None)(SM_SCALE, *case.args)
        assert_flash_mla(out, lse, reference(case, unpaged))


def test_flash_mla_tolerance_can_fail(seed):
    case, unpaged = draw(seed, np.array([20, 0]), tokens=1, heads=2, most_keys=64)
    out, lse = reference(case, unpaged)
    base_2 = lse / np.log(2)
    assert_flash_mla(jnp.asarray(out), jnp.asarray(base_2), (out, lse))
    with pytest.raises(AssertionError, match="out: 1 of"):
        assert_flash_mla(
            out + 0.01 * (np.arange(out.size) == 7).reshape(out.shape), base_2, (out, lse)
        )
    with pytest.raises(AssertionError, match="lse: 2 of"):
        assert_flash_mla(out, base_2 + 1e-3, (out, lse))
    with pytest.raises(AssertionError):
        assert_flash_mla(out * 1.005, base_2, (out, lse))
