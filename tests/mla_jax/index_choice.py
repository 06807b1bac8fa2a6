"""The lightning indexer in float64 NumPy, its rounding to fp8 emulated by ml_dtypes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from oracles import float64

TIE = 5e-2
"""By how much the score of a chosen key may be below that of one that was not."""


def hadamard_matrix(width: int) -> np.ndarray:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    shared = [[(i & j).bit_count() for j in range(width)] for i in range(width)]
    return (-1.0) ** np.asarray(shared)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The Hadamard transform of each vector, in e4m3 with a scale of its own."""
    turned = x @ hadamard_matrix(x.shape[-1]) / np.sqrt(x.shape[-1])
    if dtype == "bfloat16":
        turned = turned.astype(ml_dtypes.bfloat16).astype(np.float64)
    scale = np.maximum(np.abs(turned).max(axis=-1, keepdims=True), 1e-4) / 448
    return (turned / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def scores_of(q, k, weights) -> np.ndarray:
    """[B, S, T], by the definition, a head at a time."""
    q, k = (rounded(float64(x), str(x.dtype)) for x in (q, k))
    weights = float64(weights)
    heads, width = q.shape[-2:]
    total = np.zeros((*q.shape[:2], k.shape[1]))
    for h in range(heads):
        products = np.einsum("bsd,btd->bst", q[:, :, h], k)
        total += weights[:, :, h, None] * heads**-0.5 * width**-0.5 * np.maximum(products, 0)
    return total


def make(rng, *, batch=2, tokens=5, keys=40, heads=4, width=128, dtype="float32"):
    """Vectors with a few large columns, which fp8 alone would round badly."""

    def vectors(*shape):
        x = rng.standard_normal((*shape, width))
        x[..., rng.integers(0, width, 2)] *= 8
        return jnp.asarray(x, dtype)

    weights = jnp.asarray(rng.standard_normal((batch, tokens, heads)), jnp.float32)
    return vectors(batch, tokens, heads), vectors(batch, keys), weights


def check_choice(chosen, scores: np.ndarray, positions: np.ndarray, topk: int) -> None:
    """Each row of `chosen` holds the keys of the best scores at and before its position, once."""
    assert chosen.dtype == jnp.int32
    assert chosen.shape == (*positions.shape, topk)
    for row in np.ndindex(positions.shape):
        ids = np.asarray(chosen[row])
        seen = max(int(positions[row]) + 1, 0)
        ids = ids[ids != -1]
        assert len(ids) == len(set(ids.tolist())) == min(topk, seen)
        assert ((ids >= 0) & (ids < seen)).all()
        rest = np.setdiff1d(np.arange(seen), ids)
        if len(rest) and len(ids):
            assert scores[row][ids].min() >= scores[row][rest].max() - TIE
