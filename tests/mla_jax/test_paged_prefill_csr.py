"""`mla_paged_prefill`: CSR paging and causality against the float64 oracle, on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from csr import CLOSE, CsrCase, attend_csr, make_csr
from oracles import QUICK_COMPILE, assert_within

from mla_jax import mla_paged_decode, mla_paged_prefill

BACKENDS = ["reference", "triton"]

# (n queries, m keys): causal with a past and without, fewer keys than queries, no keys, no
# queries, a single one, and queries over several pages.
LENGTHS = [(3, 20), (5, 5), (4, 2), (2, 0), (0, 7), (0, 0), (1, 33), (19, 40)]


def prefill(backend: str, last, *args, **options):
    return mla_paged_prefill(
        *args,
        sm_scale=0.2,
        kv_last_page_len=last,
        backend=backend,
        interpret=backend == "triton",
        **options,
    )


def jitted(backend: str, **options):
    """`mla_paged_prefill` of (kv_last_page_len, *args), all of which are traced."""
    run = functools.partial(prefill, backend, **options)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


def check(results, case: CsrCase, *, full_pages: bool = False) -> None:
    out, lse = results
    want_out, want_lse = attend_csr(case, 0.2, full_pages=full_pages)
    assert out.dtype == case.q_nope.dtype
    assert lse.dtype == jnp.float32
    assert_within(out, want_out, CLOSE)
    assert_within(lse, want_lse, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("page_size", "padding"), [(1, 0), (16, 5), (64, 1)])
def test_against_the_oracle(rng, backend, page_size, padding):
    """Pages out of order and shared, NaN around them, garbage ids and NaN rows behind."""
    case = make_csr(rng, LENGTHS, page_size=page_size, padding=padding)
    check(jitted(backend)(case.last, *case.args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_jit(rng, backend):
    case = make_csr(rng, LENGTHS[:4], padding=2)
    check(prefill(backend, case.last, *case.args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_page_is_full_where_nobody_says(rng, backend):
    case = make_csr(rng, [(3, 32), (2, 0), (17, 16)])
    check(jitted(backend)(None, *case.args), case, full_pages=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"deterministic": True}])
def test_many_queries(rng, backend, options):
    """More rows than a tile of the kernel has, over more keys than one of its steps."""
    case = make_csr(rng, [(50, 130), (1, 70)], heads=5, padding=1)
    check(jitted(backend, **options)(case.last, *case.args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rope(rng, backend):
    case = make_csr(rng, [(4, 20), (2, 3)], rope=0)
    check(jitted(backend)(case.last, *case.args), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(rng, backend):
    case = make_csr(rng, LENGTHS, dtype="bfloat16", padding=3)
    out, lse = jitted(backend)(case.last, *case.args)
    want_out, want_lse = attend_csr(case, 0.2)
    assert out.dtype == jnp.bfloat16
    assert_within(out, want_out, {0.99: 1e-2, 1.0: 3e-2})
    assert_within(lse, want_lse, {1.0: 1e-4})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [0, 2])
def test_nobody_has_a_key(rng, backend, ids):
    case = make_csr(rng, [(3, 0), (1, 0)])
    case = dataclasses.replace(case, kv_indices=case.kv_indices[:ids])
    out, lse = jitted(backend)(case.last, *case.args)
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_is_prefill_of_the_last_tokens(rng, backend):
    case = make_csr(rng, [(3, 40), (3, 2), (3, 16)])
    out, lse = jitted(backend)(case.last, *case.args)
    decode_out, decode_lse = mla_paged_decode(
        *case.decode_args(3), sm_scale=0.2, kv_last_page_len=case.last, backend="reference"
    )
    assert_within(out, np.asarray(decode_out).reshape(out.shape), CLOSE)
    assert_within(lse, np.asarray(decode_lse).reshape(lse.shape), CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_traced_garbage_stays_inside(rng, backend):
    """Both indptr decrease and overshoot, ids and last lengths are of no pool: all clamped."""
    case = make_csr(rng, [(3, 32), (2, 40), (1, 16), (2, 3)], unused=0.5)
    ids, num_pages = case.kv_indices.shape[0], case.ckv_cache.shape[0]
    garbage = dataclasses.replace(
        case,
        qo_indptr=jnp.array([0, 3, -5, 6, 2**31 - 1]),
        kv_indptr=jnp.array([0, 3, 1, 5, 2**31 - 1]),
        kv_indices=case.kv_indices.at[1].set(-(2**31)).at[4].set(2**31 - 1),
        last=jnp.array([2**31 - 1, 5, -7, 3]),
    )
    clamped = dataclasses.replace(
        garbage,
        qo_indptr=jnp.array([0, 3, 3, 6, 8]),
        kv_indptr=jnp.array([0, 3, 3, 5, ids]),
        kv_indices=jnp.clip(garbage.kv_indices, 0, num_pages - 1),
        last=jnp.array([16, 5, 0, 3]),
    )
    check(jitted(backend)(garbage.last, *garbage.args), clamped)


def test_the_default_scale_is_of_a_head_before_absorption(rng):
    case = make_csr(rng, [(3, 20)], latent=512, rope=64)
    default, _ = mla_paged_prefill(*case.args)
    named, _ = mla_paged_prefill(*case.args, sm_scale=192**-0.5)
    np.testing.assert_array_equal(default, named)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_in_a_scan(rng, backend):
    """Lengths, page lists and contents vary from step to step, in one compiled loop."""
    make = functools.partial(make_csr, tokens=12, num_pages=12, num_ids=14)
    steps = [[(0, 0), (0, 1)], [(12, 16), (0, 17)], [(5, 90), (6, 40)], [(2, 1), (7, 7)]]
    cases = [make(rng, lengths) for lengths in steps]
    traces = 0

    @jax.jit
    def loop(stacked):
        def step(carry, arrays):
            nonlocal traces
            traces += 1
            last, *args = arrays
            return carry, prefill(backend, last, *args)

        return jax.lax.scan(step, None, stacked)[1]

    for order in (cases, cases[::-1]):
        rows = [(case.last, *case.args) for case in order]
        outs, lses = loop([jnp.stack(column) for column in zip(*rows, strict=True)])
        for case, *results in zip(order, outs, lses, strict=True):
            check(results, case)
    assert traces == 1


REFUSED = [
    (
        {"qo_indptr": jnp.array([0, 2, 4])},
        "qo_indptr: got 4 at its end, expected at most 3 rows of",
    ),
    ({"qo_indptr": jnp.array([0, 2, 1])}, "qo_indptr: got 1 after 2, expected no decrease"),
    ({"qo_indptr": jnp.array([1, 2, 3])}, "qo_indptr: got 1 as its first value, expected 0"),
    ({"qo_indptr": jnp.array([0])}, r"qo_indptr: got shape \(1,\), expected one more than"),
    ({"qo_indptr": jnp.int32(0)}, r"qo_indptr: got shape \(\), expected one more than"),
    ({"kv_indptr": jnp.array([0, 3])}, r"kv_indptr: got shape \(2,\), expected \(3,\), one more"),
    ({"kv_indptr": jnp.array([0, 2, 9])}, "kv_indptr: got 9 at its end, expected at most 6 ids in"),
    ({"kv_indptr": jnp.array([0, 2, 1])}, "kv_indptr: got 1 after 2, expected no decrease"),
    ({"kv_indptr": jnp.array([-1, 2, 3])}, "kv_indptr: got -1 as its first value, expected 0"),
    ({"kv_indices": jnp.array([0, 1, 99])}, "kv_indices: got ids from 0 to 99, expected 0 to 4"),
    ({"kv_last_page_len": jnp.array([3, 17])}, "kv_last_page_len: got 3 to 17, expected 1 to 16$"),
    ({"kv_last_page_len": jnp.ones(3)}, r"kv_last_page_len: got shape \(3,\), expected \(2,\)"),
    ({"sm_scale": None}, "sm_scale: got None for latent 32 and rope 16, expected a value: the"),
    ({"q_nope": jnp.ones((3, 32))}, r"q_nope: got shape \(3, 32\), expected \[tokens, heads, w"),
    ({"q_pe": jnp.ones((1, 3, 2, 16))}, r"q_pe: got shape \(1, 3, 2, 16\), expected \[tokens, h"),
    ({"q_pe": jnp.ones((2, 2, 16))}, r"q_pe: got shape \(2, 2, 16\), expected \(3, 2, 16\)"),
    ({"ckv_cache": jnp.ones((5, 16))}, r"ckv_cache: got shape \(5, 16\), expected \[pages, page"),
    ({"kpe_cache": jnp.ones((5, 8, 16))}, r"kpe_cache: got shape \(5, 8, 16\), expected \(5, 16"),
    ({"backend": "cuda"}, "backend: got 'cuda', expected None or one of"),
]
REFUSED_TYPES = [
    ({"qo_indptr": np.array([0, 2, 3])}, "qo_indptr: got dtype int64, expected int32"),
    ({"kv_indptr": np.array([0, 1, 3])}, "kv_indptr: got dtype int64, expected int32"),
    ({"kv_indices": np.array([0, 1, 3])}, "kv_indices: got dtype int64, expected int32"),
    ({"ckv_cache": jnp.ones((5, 16, 32), "bfloat16")}, "ckv_cache: got dtype bfloat16, expected f"),
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(ValueError, *row) for row in REFUSED] + [(TypeError, *row) for row in REFUSED_TYPES],
)
def test_refusals(rng, error, change, message):
    """One line, with the argument, what came and what was expected."""
    case = make_csr(rng, [(2, 16), (1, 32)])  # 3 pages in use, in a pool of 5; 6 ids
    names = [field.name for field in dataclasses.fields(case)][:-1]
    args = dict(zip(names, case.args, strict=True), sm_scale=0.1)
    with pytest.raises(error, match=f"^{message}") as refusal:
        mla_paged_prefill(**args | change)
    assert "\n" not in str(refusal.value)
