"""Block-scaled FP8 matrices for tests, and what products with them are, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import float64

from pallas_kernels.block_scaled import BlockScaled

Block = tuple[int, int]


def spread(scales: np.ndarray, block: Block, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each element of a matrix, or of a stack of them, of this shape."""
    rows, columns = shape[-2:]
    by_row = np.repeat(scales, block[0], axis=-2)[..., :rows, :]
    return np.repeat(by_row, block[1], axis=-1)[..., :columns]


def random_blocks(
    rng: np.random.Generator, *shape: int, block: Block = (128, 128), power_of_two: bool = False
) -> BlockScaled:
    """A matrix of about unit gain: N(0, 1) in FP8, and scales that differ from block to block."""
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = rng.uniform(0.25, 1.5, grid) / np.sqrt(shape[-1])
    return BlockScaled(
        values=jnp.asarray(rng.standard_normal(shape), jnp.float8_e4m3fn),
        scales=jnp.asarray(scales, jnp.float32),
        block_size=block,
        power_of_two=power_of_two,
    )


def meant(weight: BlockScaled) -> np.ndarray:
    """The numbers that a block-scaled matrix stands for."""
    scales = spread(float64(weight.scales), weight.block_size, weight.shape)
    return float64(weight.values) * scales


def quantised(x: np.ndarray, *, power_of_two: bool = False) -> np.ndarray:
    """x as groups of 128 columns in FP8 give it back."""
    out = np.empty(x.shape)
    for first in range(0, x.shape[-1], 128):
        group = x[..., first : first + 128]
        scale = np.maximum(np.abs(group).max(axis=-1, keepdims=True), 1e-4) / 448
        if power_of_two:
            scale = 2.0 ** np.ceil(np.log2(scale))
        out[..., first : first + 128] = float64((group / scale).astype(jnp.float8_e4m3fn)) * scale
    return out


def product(x: np.ndarray, weight: BlockScaled) -> np.ndarray:
    """[*batch, in] by [out, in] -> [*batch, out]."""
    return quantised(x, power_of_two=weight.power_of_two) @ meant(weight).T


def assert_rows_near(got: jax.Array | np.ndarray, want: np.ndarray, *, share: float) -> None:
    """At least `share` of the first axis agrees to float32, the rest as far as FP8 goes.

    A number may lie so near the middle of two of FP8 that float64 rounds it to the other, which
    moves everything that follows from it.
    """
    got = float64(got)
    assert got.shape == want.shape
    error = (np.abs(got - want) / want.std()).reshape(len(want), -1)
    near = error.max(axis=1) < 3e-5
    assert near.mean() >= share, f"only {near.mean():.0%} of the rows, {error.max(axis=1)}"
    assert np.median(error, axis=1).max() < 0.2
