"""What every backend of `paged_decode` must do, as suites for one thin subclass a backend."""

import dataclasses
import functools
from collections.abc import Sequence

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


def each(argument: str, of: str):
    """Runs a test of the suite with each `argument` that the class has in its attribute `of`."""

    def mark(test):
        test.each = argument, of
        return test

    return mark


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
    """What every backend does; a subclass names one, and the sizes that it is asked for."""

    backend: str
    interpret: bool

    dtype = "float32"
    latent, rope = 64, 16
    ropes: Sequence[int] = (0, 16)
    widths: Sequence[tuple[int, int]] = ((16, 0), (64, 64), (256, 32), (512, 64))
    """Pairs of latent and rope."""
    page_sizes: Sequence[int] = (1, 3, 16, 32, 64, 128, 256)
    some_page_sizes: Sequence[int] = (1, 3, 16, 64)
    head_counts: Sequence[int] = (1, 16, 40, 128)
    many_tokens: Sequence[tuple[int, int]] = ((2, 5), (3, 5), (5, 5), (8, 5))
    """Query tokens, and heads with them."""
    half_precision: Sequence[tuple[int, int]] = ((3, 1), (64, 3))
    """Page sizes and query tokens: one block of rows, and more, which have other tiles."""
    longest = 200
    examples = 10

    def pytest_generate_tests(self, metafunc) -> None:
        if each := getattr(metafunc.function, "each", None):
            argument, attribute = each
            metafunc.parametrize(argument, getattr(metafunc.cls, attribute), ids=str)

    def make(self, rng: np.random.Generator, **sizes) -> PagedCase:
        """`make_paged` with the backend's dtype and widths, where `sizes` has no others."""
        widths = {"latent": self.latent, "rope": self.rope, "dtype": self.dtype}
        return make_paged(rng, **{**widths, **sizes})

    def call(self, case: PagedCase, sm_scale: float, num_splits: int | None = 1):
        return jitted(self.backend, self.interpret, num_splits)(sm_scale, *case.args)

    def compare(self, results, case: PagedCase, sm_scale: float) -> None:
        """(out, lse) are the oracle's of `case`."""
        out, lse = results
        want_out, want_lse = paged_attention(case, sm_scale)
        assert out.dtype == case.q_nope.dtype
        assert lse.dtype == jnp.float32
        assert_within(out, want_out, OUT[str(out.dtype)])
        assert_within(lse, want_lse, LSE)

    def check(self, case: PagedCase, num_splits: int | None = 1) -> None:
        sm_scale = (case.q_nope.shape[-1] + case.q_pe.shape[-1]) ** -0.5  # scores of order 1
        self.compare(self.call(case, sm_scale, num_splits), case, sm_scale)

    def check_large(self, case: PagedCase, sm_scale: float) -> np.ndarray:
        """The oracle's lse, for scores that are large in float32 too."""
        out, lse = self.call(case, sm_scale)
        want_out, want_lse = paged_attention(case, sm_scale)
        small = OUT[self.dtype]
        assert_within(out, want_out, {0.99: max(2e-3, small[0.99]), 1.0: max(1e-2, small[1.0])})
        assert_within(lse, want_lse, {1.0: 2e-3})
        return want_lse

    def make_long(self, rng: np.random.Generator, *lengths: int) -> PagedCase:
        """Two requests, at most the longest; the shapes do not depend on the lengths."""
        number = 2 * self.longest // 16
        return self.make(
            rng, lengths=lengths, page_size=16, heads=8, num_pages=number, num_ids=number
        )

    @each("page_size", of="page_sizes")
    def test_page_sizes(self, rng, page_size):
        case = self.make(rng, lengths=ragged(page_size), page_size=page_size, heads=8)
        self.check(case, num_splits=3)

    @each("heads", of="head_counts")
    def test_heads(self, rng, heads):
        """Split as the lengths and the cores ask for."""
        self.check(self.make(rng, lengths=(0, 70, 5), page_size=32, heads=heads), num_splits=None)

    @each("sizes", of="half_precision")
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype, sizes):
        page_size, tokens = sizes
        lengths = (*ragged(page_size), 200)
        case = self.make(
            rng, lengths=lengths, page_size=page_size, heads=15, tokens=tokens, dtype=dtype
        )
        self.check(case, num_splits=2)

    @each("sizes", of="many_tokens")
    def test_query_tokens(self, rng, sizes):
        """Lengths below `tokens`, whose first queries see no key, and a full last tile of keys."""
        tokens, heads = sizes
        lengths = (0, 1, tokens - 1, tokens, tokens + 1, 45, 64)
        self.check(self.make(rng, lengths=lengths, page_size=16, heads=heads, tokens=tokens))

    @pytest.mark.parametrize("num_splits", [1, 3, 8, None])
    def test_splits(self, rng, num_splits):
        """More splits than blocks of keys too: the rest of them are empty."""
        case = self.make(rng, lengths=(0, 1, 33, self.longest), page_size=16, heads=8)
        self.check(case, num_splits=num_splits)

    @each("widths", of="widths")
    def test_widths(self, rng, widths):
        latent, rope = widths
        lengths = (0, 17, 65)
        self.check(self.make(rng, lengths=lengths, page_size=64, heads=8, latent=latent, rope=rope))

    @pytest.mark.parametrize("sm_scale", [7.0, 20.0])
    def test_large_scores(self, rng, sm_scale):
        """The running maximum keeps exponentials in range."""
        case = self.make_long(rng, self.longest, 7)
        assert np.abs(self.check_large(case, sm_scale)).max() > 100

    @pytest.mark.parametrize("rise", [0.05, 0.4, 3.0])
    def test_rising_scores(self, rng, rise):
        """From key to key, by up to `rise`, and as much down in other heads: a maximum that moves
        with each few keys, with none, or with every one."""
        case = self.make_long(rng, self.longest, 90)
        page_size, number = case.ckv_cache.shape[1], len(case.kpe_cache)
        place = np.zeros(number)
        for start, length in zip(np.asarray(case.start), np.asarray(case.length), strict=True):
            pages = np.asarray(case.page_ids)[start:][: -(-length // page_size)]
            place[pages] = np.arange(len(pages)) * page_size
        keys = place[:, None] + np.arange(page_size)
        slope = np.linspace(-1, 1, 8)[:, None].repeat(self.rope, 1) * rise
        kpe = np.where(np.isnan(case.kpe_cache), np.nan, keys[..., None] / self.rope)
        case = dataclasses.replace(
            case,
            q_nope=case.q_nope / 8,
            q_pe=jnp.broadcast_to(jnp.asarray(slope, self.dtype), case.q_pe.shape),
            kpe_cache=jnp.asarray(kpe, self.dtype),
        )
        self.check_large(case, 1.0)

    def test_nothing_cached(self, rng):
        case = self.make(rng, lengths=(0, 0), page_size=16, heads=3)
        out, lse = self.call(case, 0.1)
        np.testing.assert_array_equal(out, np.zeros(out.shape))
        np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))

    def test_without_jit(self, rng):
        case = self.make(rng, lengths=(20, 0), page_size=16, heads=2)
        options = {"num_splits": 1, "backend": self.backend, "interpret": self.interpret}
        self.compare(paged_decode(*case.args, sm_scale=0.3, **options), case, 0.3)

    def test_block_table(self, rng):
        """The adapter that the docstring promises: ids = table.ravel(), start = b * max_pages."""
        case = self.make(rng, lengths=(40, 0, 16), page_size=16, heads=4)
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
            case = self.make(rng, lengths=lengths, page_size=16, heads=4, num_pages=30, num_ids=40)
            self.compare(run(sm_scale, *case.args), case, sm_scale)
        assert traces == 1

    def test_in_scan(self, rng):
        """Growing lengths in a compiled loop."""
        case = self.make(rng, lengths=(70, 35), page_size=16, heads=4)
        lengths = jnp.asarray([[0, 0], [16, 17], [69, 1], [70, 35]], jnp.int32)

        @jax.jit
        def loop(lengths):
            def step(total, length):
                results = paged_decode(
                    *dataclasses.replace(case, length=length).args,
                    sm_scale=0.25,
                    num_splits=2,
                    backend=self.backend,
                    interpret=self.interpret,
                )
                return total + length.sum(), results

            return jax.lax.scan(step, jnp.int32(0), lengths)

        _, results = loop(lengths)
        for length, *result in zip(lengths, *results, strict=True):
            self.compare(result, dataclasses.replace(case, length=length), 0.25)

    def test_ids_out_of_range(self, rng):
        """Those of used pages too: the nearest page of the pool is read instead."""
        case = self.make(rng, lengths=(0, 70, 33, 9), page_size=16, heads=3)
        finite = [jnp.nan_to_num(pool) for pool in (case.ckv_cache, case.kpe_cache)]
        case = dataclasses.replace(case, ckv_cache=finite[0], kpe_cache=finite[1])
        replaced = rng.random(len(case.page_ids)) < 0.5
        ids = np.where(replaced, rng.choice(GARBAGE, replaced.size), np.asarray(case.page_ids))
        inside = np.clip(ids, 0, len(finite[0]) - 1)
        sm_scale = 0.1
        results = self.call(
            dataclasses.replace(case, page_ids=jnp.asarray(ids, jnp.int32)), sm_scale
        )
        same = dataclasses.replace(case, page_ids=jnp.asarray(inside, jnp.int32))
        self.compare(results, same, sm_scale)

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
        case = self.make(rng, lengths=(40, 30, 20, 10, 50, 60), page_size=16, heads=3)
        start = jnp.asarray([-5, 2**31 - 1, -(2**31), 0, 3, 1000], jnp.int32)
        length = jnp.asarray([40, 30, 20, -1, -(2**31), 60], jnp.int32)
        changed = dataclasses.replace(case, start=start, length=length)
        self.check_finite(changed, num_splits, [False, False, False, True, True, False])

    def test_longer_than_the_ids(self, rng):
        """Lengths that the ids cannot hold read some pages."""
        case = self.make(rng, lengths=(5, 3, 0), page_size=self.page_sizes[0], heads=3)
        changed = dataclasses.replace(case, length=jnp.asarray([500, 900, 0], jnp.int32))
        self.check_finite(changed, None, [False, False, True])

    @each("page_size", of="some_page_sizes")
    def test_any_lengths(self, page_size):
        """Shapes stay, so that this compiles once: lengths, page order, ids and contents vary."""

        @few(max_examples=self.examples)
        @given(lengths=st.tuples(*[st.integers(0, self.longest // 2)] * 3), seed=SEEDS)
        def check(lengths, seed):
            case = self.make(
                np.random.default_rng(seed),
                lengths=lengths,
                page_size=page_size,
                heads=3,
                tokens=2,
                num_pages=2 * self.longest // page_size + 8,
                num_ids=2 * self.longest // page_size + 14,
            )
            self.check(case, num_splits=None)

        check()

    def test_any_shapes(self):
        @few(max_examples=min(self.examples, 6))
        @given(
            lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
            page_size=st.sampled_from(self.page_sizes),
            heads=st.sampled_from([1, 2, 4, 5, 8, 16, 20, 32, 64]),
            tokens=st.integers(1, 8),
            rope=st.sampled_from(self.ropes),
            num_splits=st.sampled_from([1, 2, 5, None]),
            seed=SEEDS,
        )
        def check(lengths, page_size, heads, tokens, rope, num_splits, seed):
            case = self.make(
                np.random.default_rng(seed),
                lengths=tuple(lengths),
                page_size=page_size,
                heads=heads,
                tokens=tokens,
                rope=rope,
            )
            self.check(case, num_splits=num_splits)

        check()


class KernelSuite(PagedDecodeSuite):
    """What a Pallas kernel does besides, in its interpreter."""

    interpret = True
    narrowest = (16, 0)
    split_lengths = (300, 900)
    """Within these, a request is split where the result must be deterministic."""
    split_heads: Sequence[tuple[int, int]] = ((3, 1), (128, 5))
    """Heads and query tokens: the last have more rows than the merge takes in its usual way, in
    the batch but not in a request."""
    flash_mla_heads: Sequence[int] = (1, 3, 9)

    @each("sizes", of="split_heads")
    def test_deterministic(self, rng, sizes):
        """To the bit, whatever else is in the batch, with requests that are split."""
        heads, tokens = sizes

        @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        def run(*args):
            options = {"backend": self.backend, "interpret": True, "deterministic": True}
            return paged_decode(*args, sm_scale=0.3, **options)

        drawn = tuple(rng.integers(*self.split_lengths, 2).tolist())
        latent, rope = self.narrowest
        case = self.make(
            rng,
            lengths=(*drawn, 0, 17),
            page_size=16,
            heads=heads,
            tokens=tokens,
            latent=latent,
            rope=rope,
        )
        want = run(*case.args)
        self.compare(want, case, 0.3)

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

    @each("heads", of="flash_mla_heads")
    @pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (2, 1)])
    def test_flash_mla_grid(self, seed, batch, tokens, heads):
        """A corner of FlashMLA's grid at its tolerances; the whole of it runs on a GPU."""
        for keys in (20, 140):
            lengths = np.full(batch, keys)
            case, unpaged = draw(seed, lengths, tokens=tokens, heads=heads, most_keys=192)
            out, lse = self.call(case, SM_SCALE, None)
            assert_flash_mla(out, lse, reference(case, unpaged))
