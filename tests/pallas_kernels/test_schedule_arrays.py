"""Prefix sums, selections and sorts of small arrays, and of those too large to compare all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.schedule.arrays import COMPARED, positions, sorted_by, sum_before

SIZES = [1, 2, 37, COMPARED, COMPARED + 1]


@pytest.fixture(params=SIZES)
def numbers(request, rng) -> np.ndarray:
    """Few values, so that many are equal, and negative ones."""
    return rng.integers(-3, 4, request.param).astype(np.int32)


def test_sum_before(numbers):
    got = jax.jit(sum_before)(jnp.asarray(numbers))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.cumsum(numbers) - numbers)
    rows = np.stack([numbers, numbers[::-1], 0 * numbers])
    np.testing.assert_array_equal(sum_before(jnp.asarray(rows)), np.cumsum(rows, axis=1) - rows)


@pytest.mark.parametrize("chosen_of", [lambda x: x > 0, lambda x: x > 9, lambda x: x < 9])
def test_positions(numbers, chosen_of):
    """More, as many, and fewer places than there are chosen ones; none and all of them too."""
    chosen = chosen_of(numbers)
    for size in (1, max(int(chosen.sum()), 1), len(numbers)):
        want = np.full(size, len(numbers))
        found = np.flatnonzero(chosen)[:size]
        want[: len(found)] = found
        got = positions(jnp.asarray(chosen), size)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


def test_sorted_by(numbers):
    """Stable: equal keys leave the arrays in their order."""
    arrays = np.arange(len(numbers), dtype=np.int32), -numbers
    got = jax.jit(sorted_by)(jnp.asarray(numbers), tuple(map(jnp.asarray, arrays)))
    order = np.argsort(numbers, kind="stable")
    for array, result in zip(arrays, got, strict=True):
        assert result.dtype == jnp.int32
        np.testing.assert_array_equal(result, array[order])
