"""FP8 block scales against NumPy in float64, with a decoder of e4m3 of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quantization import weight_block_size
from pallas_kernels.block_scaled import dequantize_blocks, scale_shape


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """Sign, 4 exponent bits of bias 7, 3 fraction bits; no infinities; codes 0x7f and 0xff: NaN."""
    codes = codes.astype(np.int64)
    sign, exponent, fraction = codes >> 7, codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    value = np.where((exponent == 15) & (fraction == 7), np.nan, value)
    return np.where(sign == 1, -value, value)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """FP8 bytes, any but the two NaNs."""
    return (rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((256, 128), (128, 128)), ((130, 257), (128, 128)), ((7, 5), (128, 128)), ((33, 50), (8, 16))],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_scale_a_block(
    rng: np.random.Generator, shape: tuple[int, int], block: tuple[int, int], dtype: str
) -> None:
    codes = random_codes(rng, shape)
    scale = rng.uniform(1e-3, 2e-3, scale_shape(shape, block)).astype(np.float32)
    expected = np.empty(shape)
    for i, j in np.ndindex(shape):
        expected[i, j] = decode_e4m3(codes[i, j]) * scale[i // block[0], j // block[1]]

    weight = jnp.asarray(codes.view(jnp.float8_e4m3fn))
    got = dequantize_blocks(weight, jnp.asarray(scale), dtype, block_size=block)

    assert got.dtype == dtype
    # The product is exact to float32, and rounded at most once more.
    np.testing.assert_array_equal(np.asarray(got), expected.astype(np.float32).astype(got.dtype))


def test_a_stack_of_matrices_is_scaled_one_by_one(rng: np.random.Generator) -> None:
    weight = jnp.asarray(random_codes(rng, (3, 20, 9)).view(jnp.float8_e4m3fn))
    scale = jnp.asarray(rng.uniform(1, 2, (3, 3, 2)).astype(np.float32))
    stacked = dequantize_blocks(weight, scale, jnp.float32, block_size=(8, 8))
    for got, matrix, scales in zip(stacked, weight, scale, strict=True):
        alone = dequantize_blocks(matrix, scales, jnp.float32, block_size=(8, 8))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(alone))


def test_a_missing_scale_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scale_inv: got shape \(1, 1\), expected \(2, 1\)"):
        dequantize_blocks(jnp.ones((129, 128), jnp.float8_e4m3fn), jnp.ones((1, 1)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, (128, 128)),
        ({"quant_method": "fp8"}, (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, (64, 32)),
    ],
)
def test_block_size_of_a_config(settings: dict | None, expected: tuple[int, int]) -> None:
    assert weight_block_size({"quantization_config": settings}) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "awq"}, "quant_method = 'awq'"),
        ({"weight_block_size": [128]}, "weight_block_size: got"),
        ({"weight_block_size": [128, 0]}, "weight_block_size: got"),
        ({"weight_block_size": 128}, "weight_block_size: got 128"),
        ("fp8", "quantization_config: got 'fp8'"),
    ],
)
def test_settings_refused_by_name(settings: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_block_size({"quantization_config": settings})
