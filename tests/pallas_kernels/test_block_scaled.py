"""Products with block-scaled FP8 matrices, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from fp8_weights import assert_rows_near, meant, product, quantised, random_blocks
from oracles import float64

from pallas_kernels import block_scaled
from pallas_kernels.block_scaled import scaled_product


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"),
    [
        (576, 256, (128, 128)),
        (130, 300, (128, 128)),  # ragged at every edge
        (70, 200, (32, 48)),  # blocks that cut the activations' groups
        (9, 20, (4, 5)),
        (24, 384, (128, 256)),  # a block over several groups
    ],
)
def test_product(rng, outputs, inputs, block, power_of_two):
    weight = random_blocks(rng, outputs, inputs, block=block, power_of_two=power_of_two)
    x = rng.standard_normal((4, 2, inputs)).astype(np.float32)
    got = scaled_product(jnp.asarray(x), weight)
    assert got.dtype == jnp.float32
    want = product(float64(x), weight)
    assert got.shape == want.shape == (4, 2, outputs)
    assert_rows_near(got.reshape(8, -1), want.reshape(8, -1), share=0.75)
    # which is not what unquantised activations give, though near it
    exact = float64(x) @ meant(weight).T
    error = np.abs(want - exact).max()
    assert 1e-3 < error < 0.25
    np.testing.assert_allclose(got, exact, rtol=0, atol=0.25)


def test_a_stack(rng):
    """Gate and up at once: each matrix begins with blocks of its own."""
    weight = random_blocks(rng, 2, 150, 140)
    x = rng.standard_normal((8, 140)).astype(np.float32)
    got = scaled_product(jnp.asarray(x), weight)
    assert got.shape == (8, 2, 150)
    for i in range(2):
        assert_rows_near(got[:, i], product(float64(x), weight[i]), share=0.75)


@pytest.mark.parametrize("most", [1, 8 * 130 * 2, 8 * 130 * 4])
def test_a_few_groups_at_a_time(rng, monkeypatch, most):
    """So many rows that their products do not all fit: 12 groups, by 1, 2 and 4."""
    weight = random_blocks(rng, 130, 12 * 128)
    x = jnp.asarray(rng.standard_normal((8, 12 * 128)), jnp.float32)
    monkeypatch.setattr(block_scaled, "MOST_PARTIALS", most)
    assert_rows_near(scaled_product(x, weight), product(float64(x), weight), share=0.75)


def test_each_row_has_scales_of_its_own(rng):
    """Rows of very different size, and one group of zeros."""
    weight = random_blocks(rng, 40, 260)
    x = rng.standard_normal((8, 260)) * 10.0 ** np.arange(-3, 5)[:, None]
    x[1, 128:256] = 0
    x = x.astype(np.float32)
    size = np.abs(x).max(axis=1, keepdims=True)
    got = float64(scaled_product(jnp.asarray(x), weight)) / size
    assert_rows_near(got, product(float64(x), weight) / size, share=0.75)


def test_dequantised(rng):
    weight = random_blocks(rng, 3, 50, 70, block=(16, 32))
    np.testing.assert_allclose(weight.dequantized(jnp.float32), meant(weight), rtol=1e-6)
    assert weight[1].shape == (50, 70)
    np.testing.assert_array_equal(
        weight[1].dequantized(jnp.bfloat16), weight.dequantized(jnp.bfloat16)[1]
    )


def test_the_oracle_rounds_to_fp8():
    """Four numbers by hand: the scale is 1, and 17 lies between 16 and 18."""
    x = np.asarray([[448.0, 17.0, 0.3, -19.0]])
    np.testing.assert_array_equal(quantised(x), [[448, 16, 0.3125, -20]])
    x = np.asarray([[300.0, 17.0, 0.3, -19.0]])
    np.testing.assert_array_equal(quantised(x, power_of_two=True), [[288, 16, 0.3125, -20]])
