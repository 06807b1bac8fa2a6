"""Token-sparse attention and the indexer on the chip, against the float64 oracles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_pages import as_operands
from index_choice import check_choice, make, scores_of
from on_gpu import needs_gpu
from oracles import assert_within
from token_lists import attend_lists, in_fp8, make_lists

from mla_jax import lightning_indexer, mla_paged_decode, mla_sparse_decode, mla_sparse_prefill

pytestmark = needs_gpu

# Of outputs of about unit size: the inputs' rounding is the oracle's too, the result's is not.
OUT = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 8e-3, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {"float32": {1.0: 1e-4}, "bfloat16": {1.0: 1e-3}, "float16": {1.0: 1e-3}}
WIDE: dict[str, Any] = {"latent": 512, "rope": 64}
COUNTS = (0, 1, 63, 64, 65, 700, 2047, 2048)


def check(function, case, exact=None, *, backend="triton", **options) -> None:
    def run(*args):
        return function(*args, sm_scale=0.05, backend=backend, **options)

    out, lse = jax.jit(run)(*case.args)
    exact = exact or case
    want_out, want_lse = attend_lists(
        as_operands(exact) if backend == "mosaic_gpu" else exact, 0.05
    )
    assert_within(out, want_out, OUT[str(out.dtype)])
    assert_within(lse, want_lse, LSE[str(out.dtype)])


BACKENDS = ["triton", "mosaic_gpu"]


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 32, 64, 65, 128])
def test_decode(rng, heads, dtype, gaps):
    case = make_lists(rng, COUNTS, heads=heads, topk=2048, gaps=gaps, **WIDE, dtype=dtype)
    for backend in BACKENDS[: 1 if dtype == "float32" else 2]:
        check(mla_sparse_decode, case, backend=backend)


@pytest.mark.parametrize(("latent", "rope"), [(64, 0), (64, 32), (256, 64), (512, 0)])
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_widths(rng, latent, rope, page_size):
    sizes: dict[str, Any] = {"latent": latent, "rope": rope, "page_size": page_size}
    check(mla_sparse_decode, make_lists(rng, (90, 0, 128), heads=16, dtype="bfloat16", **sizes))


@pytest.mark.parametrize("options", [{"num_splits": 1}, {"num_splits": 7}, {"deterministic": True}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [16, 128])
def test_options(rng, heads, backend, options):
    case = make_lists(rng, COUNTS, heads=heads, topk=2048, dtype="bfloat16", **WIDE)
    check(mla_sparse_decode, case, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_of_many_queries(rng, backend):
    """More queries than a plan compares with each other."""
    counts = rng.integers(0, 129, 1500).tolist()
    case = make_lists(rng, counts, heads=16, dtype="bfloat16", **WIDE)
    check(mla_sparse_prefill, case, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["slot", "tensor"])
@pytest.mark.parametrize("heads", [16, 128])
def test_fp8_cache(rng, heads, layout, backend):
    case = make_lists(rng, COUNTS, heads=heads, topk=2048, dtype="bfloat16", **WIDE)
    stored, scales, exact = in_fp8(case, layout)
    check(mla_sparse_decode, stored, exact, backend=backend, kv_scales=scales)


@pytest.mark.parametrize("heads", [16, 128])
def test_everything_is_dense(rng, heads):
    case = make_lists(
        rng,
        (2048,),
        heads=heads,
        topk=2048,
        num_pages=32,
        page_size=64,
        gaps=False,
        dtype="bfloat16",
        **WIDE,
    )
    pages = jnp.arange(32, dtype=jnp.int32)
    q_nope, q_pe, ckv, kpe, _ = case.args
    dense = mla_paged_decode(
        *(q_nope, q_pe, ckv, kpe, jnp.array([0, 32]), pages), sm_scale=0.05, backend="triton"
    )
    sparse = mla_sparse_decode(*case.args, sm_scale=0.05, backend="triton")
    assert_within(sparse[0], np.asarray(dense[0], np.float64), {1.0: 8e-3})
    assert_within(sparse[1], np.asarray(dense[1], np.float64), {1.0: 1e-4})


def test_deterministic(rng):
    """A query's bits are the same alone, and among others in any order."""
    counts = rng.integers(0, 2049, 40).tolist()
    case = make_lists(rng, counts, heads=128, topk=2048, dtype="bfloat16", **WIDE)
    run = jax.jit(lambda *args: mla_sparse_decode(*args, sm_scale=0.05, deterministic=True))
    out, lse = run(*case.args)
    for chosen in (rng.permutation(40), [7], rng.permutation(40)[:5]):
        some = run(*case.queries(chosen).args)
        np.testing.assert_array_equal(some[0], out[np.asarray(chosen)])
        np.testing.assert_array_equal(some[1], lse[np.asarray(chosen)])


def test_far_end_of_a_large_pool(rng):
    """Rows beyond 2^31 elements of the pool."""
    near = make_lists(
        rng, (64,), heads=16, topk=64, page_size=64, num_pages=2, **WIDE, dtype="bfloat16"
    )
    pages = (1 << 31) // (64 * 512) + 100
    pools = [
        jnp.zeros((pages, 64, pool.shape[2]), pool.dtype).at[-2:].set(pool)
        for pool in near.args[2:4]
    ]
    far = mla_sparse_decode(
        *(*near.args[:2], *pools, near.indices + (pages - 2) * 64), sm_scale=0.05, backend="triton"
    )
    want = mla_sparse_decode(*near.args, sm_scale=0.05, backend="triton")
    for ours, theirs in zip(far, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_indexer(rng):
    q, k, weights = make(rng, tokens=3, keys=900, heads=64)
    chosen = jax.jit(lambda *args: lightning_indexer(*args, topk=256))(q, k, weights)
    positions = np.broadcast_to(np.arange(897, 900), (2, 3))
    check_choice(chosen, scores_of(q, k, weights), positions, 256)
