"""`mla_ragged_prefill`: ragged rows in CSR form against float64 and dense oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from csr import CLOSE
from oracles import QUICK_COMPILE, assert_within, float64, softmax_sum

from mla_jax import mla_ragged_prefill

BACKENDS = ["reference", "triton"]
LENGTHS = [(3, 20), (5, 5), (4, 2), (2, 0), (0, 7), (0, 0), (1, 33), (19, 40)]  # (n, m)


def make(rng, lengths, *, tokens=None, keys=None, heads=2, width=48, value_width=16):
    """(q, k, v, qo_indptr, kv_indptr); rows behind the requests' are NaN."""
    n, m = np.asarray(lengths).T

    def rows(used, total, width):
        x = np.full((total, heads, width), np.nan, np.float32)
        x[:used] = rng.standard_normal((used, heads, width))
        return jnp.asarray(x)

    tokens, keys = tokens or n.sum() + 2, keys or m.sum() + 3
    return (
        rows(n.sum(), tokens, width),
        rows(m.sum(), keys, width),
        rows(m.sum(), keys, value_width),
        *(jnp.asarray(np.cumsum([0, *count]), jnp.int32) for count in (n, m)),
    )


def oracle(q, k, v, qo_indptr, kv_indptr, sm_scale):
    """(out, base-2 lse), a row at a time."""
    q, k, v = map(float64, (q, k, v))
    qo_indptr, kv_indptr = np.asarray(qo_indptr), np.asarray(kv_indptr)
    out, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[:2], -np.inf)
    for b in range(len(qo_indptr) - 1):
        n, m = (int(indptr[b + 1] - indptr[b]) for indptr in (qo_indptr, kv_indptr))
        for i in range(max(n - m, 0), n):
            keys = slice(kv_indptr[b], kv_indptr[b] + m - n + i + 1)
            for h in range(q.shape[1]):
                scores = k[keys, h] @ q[qo_indptr[b] + i, h] * sm_scale
                at = qo_indptr[b] + i, h
                out[at], lse[at] = softmax_sum(scores, v[keys, h])
    return out, lse


def attend(backend: str, *args):
    return mla_ragged_prefill(*args, sm_scale=0.2, backend=backend, interpret=backend == "triton")


def check(results, args) -> None:
    for got, want in zip(results, oracle(*args, sm_scale=0.2), strict=True):
        assert got.dtype == jnp.float32
        assert_within(got, want, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [48, 64])
def test_against_the_oracle(rng, backend, width):
    args = make(rng, LENGTHS, width=width)
    run = jax.jit(functools.partial(attend, backend), compiler_options=QUICK_COMPILE)
    check(run(*args), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compilation_in_a_scan(rng, backend):
    steps = [[(0, 0), (0, 1)], [(12, 20), (0, 17)], [(5, 30), (6, 7)], [(2, 1), (7, 7)]]
    cases = [make(rng, lengths, tokens=12, keys=40) for lengths in steps]
    traces = 0

    @jax.jit
    def loop(stacked):
        def step(carry, args):
            nonlocal traces
            traces += 1
            return carry, attend(backend, *args)

        return jax.lax.scan(step, None, stacked)[1]

    for order in (cases, cases[::-1]):
        outs, lses = loop([jnp.stack(column) for column in zip(*order, strict=True)])
        for case, *results in zip(order, outs, lses, strict=True):
            check(results, case)
    assert traces == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_traced_garbage_stays_inside(rng, backend):
    """Both indptr decrease and overshoot: clamped."""
    q, k, v, _, _ = make(rng, [(8, 12)], tokens=8, keys=12)
    qo_indptr, kv_indptr = jnp.array([0, 3, -5, 6, 2**31 - 1]), jnp.array([0, 7, 1, 9, 10**6])
    run = jax.jit(functools.partial(attend, backend), compiler_options=QUICK_COMPILE)
    clamped = (q, k, v, jnp.array([0, 3, 3, 6, 8]), jnp.array([0, 7, 7, 9, 12]))
    check(run(q, k, v, qo_indptr, kv_indptr), clamped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(rng, backend):
    """Against the dense formula, request by request; lse has a gradient too."""
    q, k, v, qo_indptr, kv_indptr = make(rng, [(3, 5), (2, 2), (1, 0)], tokens=6, keys=7)
    weights = jnp.asarray(rng.standard_normal((6, 2, 16)), jnp.float32)

    def loss(q, k, v):
        out, lse = attend(backend, q, k, v, qo_indptr, kv_indptr)
        return (out * weights).sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

    def dense(q, k, v):
        total = jnp.float32(0)
        for rows, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 5), slice(5, 7))):
            scores = jnp.einsum("thd,khd->htk", q[rows], k[keys], precision="highest") * 0.2
            n, m = scores.shape[1:]
            scores = jnp.where(np.tri(n, m, m - n, dtype=bool), scores, -1e30)
            probs = jax.nn.softmax(scores)
            out = jnp.einsum("htk,khv->thv", probs, v[keys], precision="highest")
            total += (out * weights[rows]).sum() + jax.nn.logsumexp(scores, -1).sum() / np.log(2)
        return total

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for ours, want in zip(got, jax.grad(dense, (0, 1, 2))(q, k, v), strict=True):
        assert_within(ours, float64(want), {1.0: 2e-5})


def test_the_default_scale(rng):
    args = make(rng, LENGTHS[:2], width=192, value_width=128)
    np.testing.assert_array_equal(
        mla_ragged_prefill(*args)[0], mla_ragged_prefill(*args, sm_scale=192**-0.5)[0]
    )


REFUSED = [
    (
        {"qo_indptr": jnp.array([0, 2, 4])},
        "qo_indptr: got 4 at its end, expected at most 3 rows of",
    ),
    ({"qo_indptr": jnp.array([0, 2, 1])}, "qo_indptr: got 1 after 2, expected no decrease"),
    ({"qo_indptr": jnp.array([1, 2, 3])}, "qo_indptr: got 1 as its first value, expected 0"),
    ({"qo_indptr": jnp.array([0])}, r"qo_indptr: got shape \(1,\), expected one more than"),
    ({"kv_indptr": jnp.array([0, 5])}, r"kv_indptr: got shape \(2,\), expected \(3,\), one more"),
    (
        {"kv_indptr": jnp.array([0, 5, 9])},
        "kv_indptr: got 9 at its end, expected at most 7 rows of",
    ),
    ({"kv_indptr": jnp.array([0, 5, 4])}, "kv_indptr: got 4 after 5, expected no decrease"),
    ({"kv_indptr": jnp.array([2, 5, 7])}, "kv_indptr: got 2 as its first value, expected 0"),
    ({"sm_scale": None}, "sm_scale: got None for width 48, expected a value: the default holds fo"),
    ({"sm_scale": -1.0}, "sm_scale: got -1.0, expected a positive number"),
    ({"q": jnp.ones((3, 48))}, r"q: got shape \(3, 48\), expected \[tokens, heads, width\]"),
    ({"k": jnp.ones((7, 2, 32))}, r"k: got shape \(7, 2, 32\), expected \[keys, 2, 48\]"),
    ({"v": jnp.ones((6, 2, 16))}, r"v: got shape \(6, 2, 16\), expected \[7, 2, value_width\]"),
    ({"backend": "cuda"}, "backend: got 'cuda', expected None or one of"),
]
REFUSED_TYPES = [
    ({"qo_indptr": np.array([0, 2, 3])}, "qo_indptr: got dtype int64, expected int32"),
    ({"kv_indptr": np.array([0, 5, 7])}, "kv_indptr: got dtype int64, expected int32"),
    ({"k": jnp.ones((7, 2, 48), "bfloat16")}, "k: got dtype bfloat16, expected float32"),
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(ValueError, *row) for row in REFUSED] + [(TypeError, *row) for row in REFUSED_TYPES],
)
def test_refusals(rng, error, change, message):
    """One line, with the argument, what came and what was expected."""
    names = ("q", "k", "v", "qo_indptr", "kv_indptr")
    args = dict(zip(names, make(rng, [(2, 5), (1, 2)], tokens=3, keys=7), strict=True))
    with pytest.raises(error, match=f"^{message}") as refusal:
        mla_ragged_prefill(**{**args, "sm_scale": 0.1, **change})
    assert "\n" not in str(refusal.value)
