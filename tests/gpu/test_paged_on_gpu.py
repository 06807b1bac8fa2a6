"""Paged attention on the chip: decode and prefill against the float64 oracles."""

import dataclasses
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from on_gpu import DECODE_BACKENDS, needs_gpu, with_each_backend
from oracles import (
    PagedCase,
    PrefillCase,
    assert_within,
    make_paged,
    make_prefill,
    paged_attention,
    prefill_attention,
)

from mla_jax.paged import mla_paged_decode
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

pytestmark = needs_gpu

# Of outputs of about unit size: the inputs' rounding is the oracle's too, the result's is not.
BOUNDS = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 8e-3, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {"float32": {1.0: 1e-4}, "bfloat16": {1.0: 1e-3}, "float16": {1.0: 1e-3}}
WIDE = {"latent": 512, "rope": 64}


def decode(case: PagedCase, backend: str, **options):
    def run(*args):
        return paged_decode(*args, sm_scale=0.05, backend=backend, **options)

    return jax.jit(run)(*case.args)


def check(case: PagedCase, backend: str, **options) -> None:
    out, lse = decode(case, backend, **options)
    want_out, want_lse = paged_attention(case, 0.05)
    assert_within(out, want_out, BOUNDS[str(out.dtype)])
    assert_within(lse, want_lse, LSE[str(out.dtype)])


HALF = ("bfloat16", "float16")


@pytest.mark.parametrize(
    ("backend", "page_size", "dtype"),
    with_each_backend(
        *itertools.product((1, 3, 16, 32, 64, 128, 256), ("float32", *HALF)),
        mosaic_gpu=[*itertools.product((8, 16, 32, 64, 128, 256), HALF)],
    ),
)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8, 16, 32, 64, 65, 126, 128])
def test_decode(rng, heads, backend, page_size, dtype):
    lengths = (0, 1, page_size, page_size + 1, 1000, 63)
    case = make_paged(rng, lengths=lengths, page_size=page_size, heads=heads, dtype=dtype, **WIDE)
    check(case, backend)


@pytest.mark.parametrize(
    ("backend", "latent", "rope", "dtype"),
    with_each_backend(
        *itertools.product((64, 256, 512), (0, 32, 64), ("float32", "bfloat16")),
        mosaic_gpu=[*itertools.product((128, 256, 384, 512), (0, 64), HALF)],
    ),
)
@pytest.mark.parametrize("heads", [16, 128])
def test_decode_widths(rng, heads, backend, latent, rope, dtype):
    for page_size in (1 if backend == "triton" else 8, 64):
        case = make_paged(
            rng,
            lengths=(0, 700, 65),
            page_size=page_size,
            heads=heads,
            latent=latent,
            rope=rope,
            dtype=dtype,
        )
        check(case, backend)


@pytest.mark.parametrize("backend", DECODE_BACKENDS)
@pytest.mark.parametrize("splits", [1, 3, 64, None])
@pytest.mark.parametrize("tokens", range(2, 9))
def test_decode_of_several_tokens(rng, tokens, splits, backend):
    lengths = (1, tokens - 1, tokens, 700, 130)
    for heads in (5, 16, 128):
        case = make_paged(
            rng,
            lengths=lengths,
            page_size=64,
            heads=heads,
            tokens=tokens,
            dtype="bfloat16",
            **WIDE,
        )
        check(case, backend, num_splits=splits)


@pytest.mark.parametrize("backend", DECODE_BACKENDS)
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("batch", [1, 300])
def test_decode_of_many_and_of_long_requests(rng, batch, deterministic, heads, backend):
    """More requests than workers; one request for all of them."""
    lengths = tuple(rng.integers(0, 40 if batch > 1 else 60_000, batch).tolist())
    case = make_paged(rng, lengths=lengths, page_size=64, heads=heads, dtype="bfloat16", **WIDE)
    check(case, backend, deterministic=deterministic)


@pytest.mark.parametrize(
    ("backend", "page_size"), with_each_backend((1,), (64,), mosaic_gpu=[(8,), (64,)])
)
@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (16, 4), (128, 1), (128, 2)])
def test_deterministic(rng, heads, tokens, backend, page_size):
    """Every request alone, and among any others, in any order, under any page table."""
    lengths = (5000, 0, 1, 700, 513, 9000, 64)
    case = make_paged(
        rng,
        lengths=lengths,
        page_size=page_size,
        heads=heads,
        tokens=tokens,
        dtype="bfloat16",
        **WIDE,
    )
    want = decode(case, backend, deterministic=True)
    order = rng.permutation(len(lengths))
    for requests in (order, order[:4], np.tile(order, 40), *([b] for b in order)):
        # Every copy has ids of its own; the vector's length differs too.
        chosen = np.asarray(requests)
        copies = np.arange(len(chosen)) // len(order)
        other = dataclasses.replace(
            case,
            q_nope=case.q_nope[chosen],
            q_pe=case.q_pe[chosen],
            page_ids=jnp.tile(case.page_ids, 2 * (int(copies[-1]) + 1) - len(chosen) % 2),
            start=case.start[chosen] + jnp.asarray(copies * len(case.page_ids), jnp.int32),
            length=case.length[chosen],
        )
        for got, expected in zip(decode(other, backend, deterministic=True), want, strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected[chosen]))


@pytest.mark.parametrize("backend", DECODE_BACKENDS)
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_call_repeats_itself(rng, heads, backend):
    """Without atomics there is no race to win: the same call gives the same bits."""
    lengths = (5000, 1, 700)
    case = make_paged(rng, lengths=lengths, page_size=64, heads=heads, dtype="bfloat16", **WIDE)
    run = jax.jit(lambda *args: paged_decode(*args, sm_scale=0.05, backend=backend))
    first = run(*case.args)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, run(*case.args), first)


@pytest.mark.parametrize(("backend", "heads"), with_each_backend((16,), mosaic_gpu=[(64,), (128,)]))
@pytest.mark.parametrize("num_pages", [33_000, 65_700, 131_300])
def test_decode_from_a_big_pool(rng, num_pages, backend, heads):
    """Pages past 2**31 bytes, past 2**32 bytes or 2**31 elements, and past 2**32 elements."""
    small = make_paged(
        rng,
        lengths=(0, 700, 65, 1500),
        page_size=64,
        heads=heads,
        dtype="bfloat16",
        num_pages=60,
        **WIDE,
    )
    far = jnp.asarray(num_pages - 1 - 2 * rng.permutation(60), jnp.int32)

    @jax.jit
    def grow(pool):
        return jnp.full((num_pages, *pool.shape[1:]), jnp.nan, pool.dtype).at[far].set(pool)

    ids = small.page_ids
    inside = (ids >= 0) & (ids < 60)
    big = dataclasses.replace(
        small,
        ckv_cache=grow(small.ckv_cache),
        kpe_cache=grow(small.kpe_cache),
        page_ids=jnp.where(inside, far[jnp.where(inside, ids, 0)], ids),
    )
    out, lse = decode(big, backend)
    want_out, want_lse = paged_attention(small, 0.05)
    assert_within(out, want_out, BOUNDS["bfloat16"])
    assert_within(lse, want_lse, LSE["bfloat16"])


SIZES = [(0, 0), (1, 1), (5, 0), (40, 100), (0, 9), (20, 7), (3, 1000), (129, 129), (200, 333)]


def check_prefill(case: PrefillCase, **options) -> None:
    def run(*args):
        return paged_prefill(*args, sm_scale=0.05, backend="triton", **options)

    out, lse = jax.jit(run)(*case.args)
    want_out, want_lse = prefill_attention(case, 0.05)
    assert_within(out, want_out, BOUNDS[str(out.dtype)])
    assert_within(lse, want_lse, LSE[str(out.dtype)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("heads", [1, 3, 16, 128])
def test_prefill(rng, heads, page_size, dtype):
    case = make_prefill(rng, SIZES, page_size=page_size, heads=heads, dtype=dtype, **WIDE)
    check_prefill(case)
    check_prefill(case, deterministic=True)


@pytest.mark.parametrize("rope", [0, 32])
def test_prefill_widths(rng, rope):
    case = make_prefill(rng, SIZES, page_size=64, heads=8, latent=256, rope=rope, dtype="bfloat16")
    check_prefill(case)


def test_prefill_deterministic(rng):
    """Each request's rows, whatever the others are: fewer requests, and padding behind them."""
    case = make_prefill(
        rng, [(300, 2000), (40, 100)], page_size=64, heads=16, dtype="bfloat16", **WIDE
    )
    options = {"sm_scale": 0.05, "backend": "triton", "deterministic": True}
    want = paged_prefill(*case.args, **options)
    alone = dataclasses.replace(case, q_count=case.q_count.at[1].set(0))
    got = paged_prefill(*alone.args, **options)
    # One request without an entry for the other: the grid is another.
    single = (array[:300] for array in (case.q_nope, case.q_pe))
    per_request = (array[:1] for array in case.args[5:])
    one = paged_prefill(*single, *case.args[2:5], *per_request, **options)
    for results in zip(want, got, one, strict=True):
        first, *others = (np.asarray(result[:300]) for result in results)
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("stored", [False, True])
def test_export(rng, stored):
    """An exported program, and one read back from bytes, give what the jitted function does."""
    if stored:
        pytest.importorskip("flatbuffers", reason="jax.export's serialization needs flatbuffers")
    q_nope, q_pe = (
        jnp.asarray(rng.standard_normal((3, 16, width)), jnp.bfloat16) for width in (512, 64)
    )
    ckv, kpe = (
        jnp.asarray(rng.standard_normal((20, 64, width)), jnp.bfloat16) for width in (512, 64)
    )
    indptr = jnp.asarray([0, 4, 4, 15], jnp.int32)
    indices = jnp.asarray(rng.permutation(20)[:15], jnp.int32)
    args = (q_nope, q_pe, ckv, kpe, indptr, indices)
    run = jax.jit(lambda *args: mla_paged_decode(*args))
    kernels = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    exported = jax.export.export(run, disabled_checks=[kernels])(*args)
    if stored:
        exported = jax.export.deserialize(exported.serialize())
    jax.tree.map(np.testing.assert_array_equal, jax.jit(exported.call)(*args), run(*args))
