"""`merge_partials`, plain and as a kernel, against one softmax over the union of the keys."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_within, float64, softmax_sum

from pallas_kernels.merge import merge_partials, merge_partials_triton

ROWS, LATENT = (6,), 16


@pytest.fixture(params=["reference", "triton"])
def merge(request):
    """parts -> (out, lse)"""

    def run(parts):
        stacked = (np.stack(arrays) for arrays in zip(*parts, strict=True))
        out, lse = (jnp.asarray(array, jnp.float32) for array in stacked)
        if request.param == "reference":
            return merge_partials(out, lse)
        return merge_partials_triton(out, lse, jnp.float32, interpret=True)

    return run


def attend(rng: np.random.Generator, keys: int, spread: float = 1.0):
    """(scores [*ROWS, keys], values [keys, LATENT])."""
    return rng.standard_normal((*ROWS, keys)) * spread, rng.standard_normal((keys, LATENT))


def part(scores: np.ndarray, values: np.ndarray):
    if scores.shape[-1] == 0:
        # What an empty part's `out` holds is not said, only that it is finite.
        return np.full((*ROWS, LATENT), 7.0), np.full(ROWS, -np.inf)
    return softmax_sum(scores, values)


@pytest.mark.parametrize(
    "sizes", [(4,), (1, 1), (3, 0, 9), (0, 0, 2), (1, 2, 3, 4, 5, 6, 7, 8)], ids=str
)
def test_union(merge, rng, sizes):
    scores, values = attend(rng, sum(sizes))
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(np.split(scores, cuts, axis=-1), np.split(values, cuts), strict=True)
    out, lse = merge([part(s, v) for s, v in parts])
    assert out.dtype == lse.dtype == jnp.float32
    want_out, want_lse = softmax_sum(scores, values)
    assert_within(out, want_out, {1.0: 2e-6})
    assert_within(lse, want_lse, {1.0: 2e-6})


def test_order_of_parts(merge, rng):
    parts = [part(*attend(rng, keys)) for keys in (3, 0, 5)]
    for one, other in zip(merge(parts), merge(parts[::-1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_empty_parts_change_nothing(merge, rng):
    parts = [part(*attend(rng, keys)) for keys in (3, 5)]
    empty = part(*attend(rng, 0))
    for without, having in zip(merge(parts), merge([empty, *parts, empty]), strict=True):
        np.testing.assert_array_equal(without, having)


def test_one_part_is_itself(merge, rng):
    out, lse = part(*attend(rng, 4))
    merged_out, merged_lse = merge([(out, lse)])
    np.testing.assert_array_equal(merged_out, out.astype(np.float32))
    np.testing.assert_array_equal(merged_lse, lse.astype(np.float32))


def test_all_empty(merge, rng):
    out, lse = merge([part(*attend(rng, 0))] * 3)
    np.testing.assert_array_equal(out, np.zeros((*ROWS, LATENT)))
    np.testing.assert_array_equal(lse, np.full(ROWS, -np.inf))


def test_empty_in_some_rows(merge, rng):
    """A part may be empty for one row and not for another."""
    full, other = part(*attend(rng, 3)), part(*attend(rng, 4))
    lse = full[1].copy()
    lse[1] = -np.inf
    out, merged = merge([(full[0], lse), other])
    np.testing.assert_array_equal(out[1], other[0][1].astype(np.float32))
    np.testing.assert_array_equal(merged[1], other[1][1].astype(np.float32))
    assert np.isfinite(float64(out)).all()


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_far_from_zero(merge, rng, shift):
    """Exponentials of the log-sum-exps themselves would under- or overflow."""
    scores, values = attend(rng, 8)
    parts = [part(scores[..., cut] + shift, values[cut]) for cut in (slice(3), slice(3, None))]
    out, lse = merge(parts)
    want_out, want_lse = softmax_sum(scores + shift, values)
    # A float32 log-sum-exp of this size carries errors of 2e-4.
    assert_within(out, want_out, {1.0: 2e-3})
    assert_within(lse, want_lse, {1.0: 2e-3})


def test_one_part_outweighs(merge, rng):
    """A part 2**200 times heavier than the other is all of the result."""
    light, heavy = part(*attend(rng, 3)), part(*attend(rng, 3))
    out, lse = merge([light, (heavy[0], heavy[1] + 200)])
    np.testing.assert_array_equal(out, heavy[0].astype(np.float32))
    np.testing.assert_array_equal(lse, (heavy[1] + 200).astype(np.float32))


@pytest.mark.parametrize("latent", [16, 256, 512])
def test_kernel_rounds_once(rng, latent):
    """Wider than a block of columns, in the dtype asked for."""
    out = jnp.asarray(rng.standard_normal((3, 2, latent)), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
    got, got_lse = merge_partials_triton(out, lse, jnp.bfloat16, interpret=True)
    want, want_lse = merge_partials(out, lse)
    assert got.dtype == jnp.bfloat16
    assert_within(got, float64(want), {1.0: 2**-8 * float(jnp.abs(want).max())})
    assert_within(got_lse, float64(want_lse), {1.0: 1e-6})


def test_any_rows(rng):
    """The plain merge takes any row axes."""
    out = jnp.asarray(rng.standard_normal((3, 2, 4, 5)), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((3, 2, 4)), jnp.float32)
    merged, merged_lse = merge_partials(out, lse)
    flat, flat_lse = merge_partials(out.reshape(3, 8, 5), lse.reshape(3, 8))
    np.testing.assert_array_equal(merged.reshape(8, 5), flat)
    np.testing.assert_array_equal(merged_lse.reshape(8), flat_lse)
