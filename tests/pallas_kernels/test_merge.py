"""`merge_states` against one softmax over the union of the keys, in float64."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_within, float64, softmax_sum

from pallas_kernels.merge import merge_states

ROWS, WIDTH = (3, 2), 5
State = tuple[jax.Array, jax.Array]


def attend(rng: np.random.Generator, keys: int, dtype="float32") -> State:
    """The state of `keys` random keys; what an empty one's `out` holds is NaN."""
    scores = rng.standard_normal((*ROWS, keys)) * 3
    return state(scores, rng.standard_normal((keys, WIDTH)), dtype)


def state(scores: np.ndarray, values: np.ndarray, dtype="float32") -> State:
    if scores.shape[-1] == 0:
        out, lse = np.full((*ROWS, WIDTH), np.nan), np.full(ROWS, -np.inf)
    else:
        out, lse = softmax_sum(scores, values)
    return jnp.asarray(out, dtype), jnp.asarray(lse, jnp.float32)


def merge(*states: State) -> State:
    return functools.reduce(lambda a, b: merge_states(*a, *b), states)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_union(sizes, seed):
    """Any disjoint sets, empty ones among them, give the union's softmax."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((*ROWS, sum(sizes))) * 3
    values = rng.standard_normal((sum(sizes), WIDTH))
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(np.split(scores, cuts, axis=-1), np.split(values, cuts), strict=True)
    out, lse = merge(*(state(*part) for part in parts))
    assert out.dtype == lse.dtype == jnp.float32
    if sum(sizes):
        want_out, want_lse = softmax_sum(scores, values)
    else:
        want_out, want_lse = np.zeros(out.shape), np.full(ROWS, -np.inf)
    assert_within(out, want_out, {1.0: 3e-6})
    assert_within(lse, want_lse, {1.0: 3e-6})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_empty_leaves_the_other(rng, dtype):
    full, empty = attend(rng, 4, dtype), attend(rng, 0, dtype)
    for pair in ((full, empty), (empty, full)):
        merged = merge(*pair)
        assert merged[0].dtype == full[0].dtype
        jax.tree.map(np.testing.assert_array_equal, merged, full)


def test_both_empty(rng):
    out, lse = merge(attend(rng, 0), attend(rng, 0))
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    np.testing.assert_array_equal(lse, np.full(ROWS, -np.inf))


def test_empty_in_some_rows(rng):
    """A state may be empty for one row and not for another."""
    a, b = attend(rng, 3), attend(rng, 4)
    hidden = a[0].at[1].set(jnp.nan), a[1].at[1].set(-jnp.inf)
    out, lse = merge(hidden, b)
    want_out, want_lse = merge(a, b)
    np.testing.assert_array_equal(out, want_out.at[1].set(b[0][1]))
    np.testing.assert_array_equal(lse, want_lse.at[1].set(b[1][1]))


def test_order_and_grouping(rng):
    """Commutative and associative up to rounding."""
    states = [attend(rng, keys) for keys in (3, 0, 5, 1)]
    want = [float64(array) for array in merge(*states)]
    for order in itertools.permutations(states):
        a, b, c, d = order
        for got in (merge(*order), merge(merge(a, b), merge(c, d))):
            for result, expected in zip(got, want, strict=True):
                assert_within(result, expected, {1.0: 3e-6})


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_far_from_zero(rng, shift):
    """Exponentials of the log-sum-exps themselves would under- or overflow."""
    scores, values = rng.standard_normal((*ROWS, 8)), rng.standard_normal((8, WIDTH))
    parts = [state(scores[..., cut] + shift, values[cut]) for cut in (slice(3), slice(3, None))]
    out, lse = merge(*parts)
    want_out, want_lse = softmax_sum(scores + shift, values)
    # A float32 log-sum-exp of this size carries errors of 2e-4.
    assert_within(out, want_out, {1.0: 2e-3})
    assert_within(lse, want_lse, {1.0: 2e-3})


def test_one_outweighs(rng):
    """A state 2**200 times heavier than the other is all of the result."""
    light, (out, lse) = attend(rng, 3), attend(rng, 3)
    merged = merge(light, (out, lse + 200))
    np.testing.assert_array_equal(merged[0], out)
    np.testing.assert_array_equal(merged[1], lse + 200)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_once(rng, dtype):
    """float32 inside: the result is the exact merge of the rounded inputs, rounded."""
    a, b = attend(rng, 3, dtype), attend(rng, 4, dtype)
    out, lse = merge(a, b)
    exact, exact_lse = merge(*((x.astype(jnp.float32), y) for x, y in (a, b)))
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(out, exact.astype(dtype))
    np.testing.assert_array_equal(lse, exact_lse)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 2, 7, 16)])
def test_any_rows(rng, shape):
    """Down to a single row."""
    out = jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((2, *shape[:-1])), jnp.float32)
    merged, merged_lse = merge_states(out[0], lse[0], out[1], lse[1])
    assert (merged.shape, merged_lse.shape) == (shape, shape[:-1])
    share = 1 / (1 + np.exp2(float64(lse[1] - lse[0])))[..., None]
    assert_within(merged, float64(out[0]) * share + float64(out[1]) * (1 - share), {1.0: 2e-6})


def union(scores_a, scores_b, values_a, values_b) -> jax.Array:
    """A loss of the softmax over both sets, in one go."""
    scores = jnp.concatenate([scores_a, scores_b], axis=-1)
    out = jax.nn.softmax(scores) @ jnp.concatenate([values_a, values_b])
    return jnp.sin(out).sum() + jnp.cos(jax.nn.logsumexp(scores, axis=-1)).sum()


def merged_union(scores_a, scores_b, values_a, values_b) -> jax.Array:
    def attend(scores, values):
        return jax.nn.softmax(scores) @ values, jax.nn.logsumexp(scores, axis=-1) / np.log(2)

    out, lse = merge_states(*attend(scores_a, values_a), *attend(scores_b, values_b))
    return jnp.sin(out).sum() + jnp.cos(lse * np.log(2)).sum()


def test_gradient(rng):
    arrays = (*ROWS, 3), (*ROWS, 4), (3, WIDTH), (4, WIDTH)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in arrays]
    got = jax.grad(merged_union, argnums=range(4))(*inputs)
    want = jax.grad(union, argnums=range(4))(*inputs)
    for ours, exact in zip(got, want, strict=True):
        assert_within(ours, float64(exact), {1.0: 1e-5})


@pytest.mark.parametrize("keys", [(0, 0), (0, 3), (3, 0)])
def test_gradient_of_empty_states(rng, keys):
    """Finite; the other state's is as if it stood alone, the empty one's is 0."""
    a, b = (attend(rng, count) for count in keys)
    weights = jnp.asarray(rng.standard_normal(a[0].shape), jnp.float32)

    def loss(*args):
        out, lse = merge_states(*args)
        return (out * weights).sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

    gradients = jax.grad(loss, argnums=range(4))(*a, *b)
    for (by_out, by_lse), count in zip((gradients[:2], gradients[2:]), keys, strict=True):
        np.testing.assert_array_equal(by_out, weights if count else jnp.zeros_like(weights))
        np.testing.assert_array_equal(by_lse, np.full(ROWS, float(count > 0)))


OUT, LSE = jnp.zeros((2, 4)), jnp.zeros(2)
ERRORS = [
    (
        ValueError,
        (OUT, LSE, jnp.zeros((2, 5)), LSE),
        "out_b: got shape (2, 5), expected out_a's (2, 4)",
    ),
    (ValueError, (OUT, jnp.zeros(3), OUT, LSE), "lse_a: got shape (3,), expected (2,)"),
    (ValueError, (OUT, LSE, OUT, jnp.zeros((2, 1))), "lse_b: got shape (2, 1), expected (2,)"),
    (
        TypeError,
        (OUT, LSE, OUT.astype(jnp.bfloat16), LSE),
        "out_b: got dtype bfloat16, expected out_a's float32",
    ),
    (
        TypeError,
        (OUT, LSE.astype(jnp.float16), OUT, LSE),
        "lse_a: got dtype float16, expected float32",
    ),
]


@pytest.mark.parametrize(("error", "args", "text"), ERRORS)
def test_errors(error, args, text):
    # Without jaxtyping's check, which would come first.
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        inspect.unwrap(merge_states)(*args)
