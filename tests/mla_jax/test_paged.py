"""`mla_paged_decode`: CSR paging against the float64 oracle, on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from csr import CLOSE, CsrCase, attend_csr, make_csr
from oracles import QUICK_COMPILE, assert_within

from mla_jax import mla_paged_decode

BACKENDS = ["reference", "triton"]


def decode(backend: str, last, *args, **options):
    return mla_paged_decode(
        *args,
        sm_scale=0.2,
        kv_last_page_len=last,
        backend=backend,
        interpret=backend == "triton",
        **options,
    )


def jitted(backend: str, **options):
    """`mla_paged_decode` of (kv_last_page_len, *args), all of which are traced."""
    run = functools.partial(decode, backend, **options)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


def check(results, case: CsrCase, *, full_pages: bool = False) -> None:
    out, lse = results
    want_out, want_lse = attend_csr(case, 0.2, full_pages=full_pages)
    assert out.dtype == case.q_nope.dtype
    assert_within(out.reshape(want_out.shape), want_out, CLOSE)
    assert_within(lse.reshape(want_lse.shape), want_lse, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_against_the_oracle(rng, backend, tokens, page_size):
    """Empty, short and long requests; shared pages, last pages full and not, garbage behind."""
    queries = tokens or 1
    lengths = [(queries, m) for m in (37, 0, 1, 64, page_size)]
    case = make_csr(rng, lengths, page_size=page_size)
    results = jitted(backend)(case.last, *case.decode_args(tokens))
    assert results[0].shape == case.decode_args(tokens)[0].shape
    assert results[1].dtype == jnp.float32
    check(results, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_page_is_full_where_nobody_says(rng, backend):
    case = make_csr(rng, [(1, 32), (1, 0), (1, 16)])
    check(jitted(backend)(None, *case.decode_args()), case, full_pages=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rope(rng, backend):
    case = make_csr(rng, [(1, 20), (1, 3)], rope=0)
    check(jitted(backend)(case.last, *case.decode_args()), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"deterministic": True}, {"num_splits": 3}])
def test_options(rng, backend, options):
    case = make_csr(rng, [(1, 200), (1, 0), (1, 9)])
    check(jitted(backend, **options)(case.last, *case.decode_args()), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_ignores_the_rest_of_the_batch(rng, backend):
    """A request's bits are the same alone and among others, wherever its pages' ids stand."""
    lengths = [(1, 5), (1, 300), (1, 77)]
    case = make_csr(rng, lengths)
    run = jitted(backend, deterministic=True)
    out, lse = run(case.last, *case.decode_args())
    first, past = (int(case.kv_indptr[b]) for b in (1, 2))
    alone = dataclasses.replace(
        case,
        q_nope=case.q_nope[1:2],
        q_pe=case.q_pe[1:2],
        kv_indptr=jnp.array([0, past - first]),
        kv_indices=case.kv_indices[first:past],
    )
    alone_out, alone_lse = run(case.last[1:2], *alone.decode_args())
    if backend == "triton":  # XLA may sum the reference's products in another order
        np.testing.assert_array_equal(alone_out[0], out[1])
        np.testing.assert_array_equal(alone_lse[0], lse[1])
    check((alone_out, alone_lse), dataclasses.replace(alone, last=case.last[1:2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [0, 2])
def test_nobody_has_a_key(rng, backend, ids):
    case = make_csr(rng, [(1, 0), (1, 0)])
    case = dataclasses.replace(case, kv_indices=case.kv_indices[:ids])
    out, lse = jitted(backend)(case.last, *case.decode_args())
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_traced_garbage_stays_inside(rng, backend):
    """An indptr that decreases and overshoots, ids and last lengths of no pool: all clamped."""
    case = make_csr(rng, [(1, 32), (1, 40), (1, 16), (1, 3)], unused=0.5)
    ids, num_pages = case.kv_indices.shape[0], case.ckv_cache.shape[0]
    garbage = dataclasses.replace(
        case,
        kv_indptr=jnp.array([0, 3, 1, 5, 2**31 - 1]),
        kv_indices=case.kv_indices.at[1].set(-(2**31)).at[4].set(2**31 - 1),
        last=jnp.array([2**31 - 1, 5, -7, 3]),
    )
    clamped = dataclasses.replace(
        garbage,
        kv_indptr=jnp.array([0, 3, 3, 5, ids]),
        kv_indices=jnp.clip(garbage.kv_indices, 0, num_pages - 1),
        last=jnp.array([16, 5, 0, 3]),
    )
    check(jitted(backend)(garbage.last, *garbage.decode_args()), clamped)


def test_the_default_scale_is_of_a_head_before_absorption(rng):
    case = make_csr(rng, [(1, 20)], latent=512, rope=64)
    default, _ = mla_paged_decode(*case.decode_args())
    named, _ = mla_paged_decode(*case.decode_args(), sm_scale=192**-0.5)
    np.testing.assert_array_equal(default, named)


REFUSED = [
    ({"kv_indices": jnp.array([0])}, "kv_indptr: got 3 at its end, expected at most 1 ids in kv_"),
    ({"kv_indptr": jnp.array([0, 2, 1])}, "kv_indptr: got 1 after 2, expected no decrease"),
    ({"kv_indptr": jnp.array([1, 2, 3])}, "kv_indptr: got 1 as its first value, expected 0"),
    ({"kv_indptr": jnp.array([0, 3])}, r"kv_indptr: got shape \(2,\), expected \(3,\)"),
    ({"kv_indices": jnp.ones((2, 3), jnp.int32)}, r"kv_indices: got shape \(2, 3\), expected a v"),
    ({"kv_indices": jnp.array([0, 1, 99])}, "kv_indices: got ids from 0 to 99, expected 0 to 4"),
    ({"kv_indices": jnp.array([-1, 1, 2])}, "kv_indices: got ids from -1 to 2, expected 0 to 4"),
    ({"sm_scale": None}, "sm_scale: got None for latent 32 and rope 16, expected a value: the"),
    ({"q_pe": jnp.ones((2, 2))}, r"q_nope, q_pe: got shapes \(2, 2, 32\) and \(2, 2\), expected b"),
    ({"q_pe": jnp.ones((2, 3, 16))}, "q_nope, q_pe: got shapes"),
    ({"ckv_cache": jnp.ones((5, 16))}, r"ckv_cache: got shape \(5, 16\), expected \[pages, page"),
    ({"ckv_cache": jnp.ones((5, 16, 8))}, r"ckv_cache: got shape \(5, 16, 8\), expected a last"),
    ({"kpe_cache": jnp.ones((5, 8, 16))}, r"kpe_cache: got shape \(5, 8, 16\), expected \(5, 16"),
    ({"kv_last_page_len": jnp.array([1])}, r"kv_last_page_len: got shape \(1,\), expected \(2,\)"),
    ({"kv_last_page_len": jnp.array([1, 17])}, "kv_last_page_len: got 1 to 17, expected 1 to 16$"),
    ({"kv_last_page_len": jnp.array([0, 9])}, "kv_last_page_len: got 0 to 9, expected 1 to 16$"),
    ({"num_splits": 0}, "num_splits: got 0, expected None or at least 1"),
    ({"backend": "cuda"}, "backend: got 'cuda', expected None or one of"),
]
REFUSED_TYPES = [
    ({"kv_indptr": np.array([0, 1, 3])}, "kv_indptr: got dtype int64, expected int32"),
    ({"kv_indices": jnp.ones(3)}, "kv_indices: got dtype float32, expected int32"),
    ({"kv_last_page_len": jnp.ones(2)}, "kv_last_page_len: got dtype float32, expected int32"),
    ({"q_pe": jnp.ones((2, 2, 16), "bfloat16")}, "q_pe: got dtype bfloat16, expected float32"),
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(ValueError, *row) for row in REFUSED] + [(TypeError, *row) for row in REFUSED_TYPES],
)
def test_refusals(rng, error, change, message):
    """One line, with the argument, what came and what was expected."""
    case = make_csr(rng, [(1, 16), (1, 32)])  # 3 pages in use, in a pool of 5
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_indptr", "kv_indices")
    args = dict(zip(names, case.decode_args(), strict=True), sm_scale=0.1)
    with pytest.raises(error, match=f"^{message}") as refusal:
        mla_paged_decode(**args | change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_in_a_scan(rng, backend):
    """Lengths, page lists and contents vary from step to step, in one compiled loop."""
    make = functools.partial(make_csr, num_pages=12, num_ids=14)
    steps = [[(1, 0), (1, 1)], [(1, 16), (1, 17)], [(1, 90), (1, 40)], [(1, 33), (1, 0)]]
    cases = [make(rng, lengths) for lengths in steps]
    traces = 0

    @jax.jit
    def loop(stacked):
        def step(carry, arrays):
            nonlocal traces
            traces += 1
            last, *args = arrays
            return carry, decode(backend, last, *args)

        return jax.lax.scan(step, None, stacked)[1]

    arrays = [(case.last, *case.decode_args()) for case in cases]
    for order in (cases, cases[::-1]):
        rows = arrays if order is cases else arrays[::-1]
        outs, lses = loop([jnp.stack(column) for column in zip(*rows, strict=True)])
        for case, *results in zip(order, outs, lses, strict=True):
            check(results, case)
    assert traces == 1
