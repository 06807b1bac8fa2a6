"""DeepSeek-V3.2's lightning indexer: which cached tokens a query attends to (arXiv:2512.02556).

Legend: B batch, S query tokens, H heads of the indexer, T keys, D width of its heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.quantization import GROUP, quantize_groups
from pallas_kernels.precision import precision_for

SCORES_PER_STEP = 1 << 26
"""Scores of single heads that exist at a time: 256 MB."""


class IndexVectors(NamedTuple):
    """Vectors as the indexer multiplies them: e4m3 `values`, and the `scale` of each."""

    values: Float[Array, "*rows width"]
    scale: Float[Array, "*rows"]


@functools.cache
def _hadamard_matrix(width: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard(x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """x times the Hadamard matrix of its width, scaled by width^-1/2: products stay as they are.

    It spreads what is large in one column over all of them, which fp8 rounds better. Errors:
    ValueError for a width that is no power of two.

    >>> hadamard(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"x: got a last axis of {width}, expected a power of two")
    matrix = jnp.asarray(_hadamard_matrix(width), x.dtype)
    summed = jnp.matmul(
        x, matrix, precision=precision_for(x.dtype), preferred_element_type=jnp.float32
    )
    return (summed * width**-0.5).astype(x.dtype)


def quantize_vectors(x: Float[Array, "*rows width"]) -> IndexVectors:
    """What the indexer multiplies for x, its queries or keys: Hadamard, then e4m3 with a scale.

    >>> vectors = quantize_vectors(jnp.ones((3, 128)))
    >>> vectors.values.dtype, vectors.scale.shape
    (dtype(float8_e4m3fn), (3,))
    """
    if x.shape[-1] > GROUP:
        raise ValueError(f"x: got a last axis of {x.shape[-1]}, expected at most {GROUP}")
    values, scales = quantize_groups(hadamard(x))
    return IndexVectors(values, scales[..., 0])


def index_scores(
    q: IndexVectors, k: IndexVectors, weights: Float[Array, "*queries heads"]
) -> Float[Array, "*queries keys"]:
    """sum_h w_h relu(q_h . k_t) in float32, w = weights * heads^-1/2 * width^-1/2 * q's scale.

    q: [*queries, heads, width]; k: [*batch, keys, width], whose axes are q's first ones. Products
    of two e4m3 numbers are exact.
    """
    heads, width = q.values.shape[-2:]
    # e4m3 in bfloat16 loses nothing, and every device multiplies it.
    values = (x.astype(jnp.bfloat16) for x in (q.values, k.values))
    products = jnp.einsum("...hd,...td->...ht", *values, preferred_element_type=jnp.float32)
    weights = weights.astype(jnp.float32) * q.scale * (heads * width) ** -0.5
    scores = (jnp.maximum(products, 0) * weights[..., None]).sum(axis=-2)
    return scores * k.scale


def select_keys(
    q: IndexVectors,
    k: IndexVectors,
    weights: Float[Array, "batch tokens heads"],
    positions: Int[Array, "batch tokens"],
    topk: int,
) -> Int[Array, "batch tokens topk"]:
    """The positions of each query's `topk` best keys up to its own, -1 where there are fewer."""
    batch, tokens, heads, _ = q.values.shape
    keys = k.values.shape[1]
    position = jnp.arange(keys, dtype=jnp.int32)

    def choose(query: tuple[IndexVectors, Array, Array]) -> Array:
        q, weights, at = query  # of one token of every row
        # A select: keys behind the query may be NaN.
        seen = position <= at[:, None]
        scores = jnp.where(seen, index_scores(q, k, weights), -jnp.inf)
        scores = jnp.pad(scores, ((0, 0), (0, max(topk - keys, 0))), constant_values=-jnp.inf)
        best, chosen = lax.top_k(scores, topk)
        return jnp.where(jnp.isneginf(best), -1, chosen.astype(jnp.int32))

    by_token = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, weights, positions))
    at_a_time = max(1, SCORES_PER_STEP // (batch * heads * keys))
    chosen = lax.map(choose, by_token, batch_size=min(at_a_time, tokens))
    return jnp.swapaxes(chosen, 0, 1)


def places(
    positions: Int[Array, "batch *axes"], block_table: Int[Array, "batch pages"], page_size: int
) -> Int[Array, "batch *axes"]:
    """Where a row's tokens lie in the pool: page * page_size + offset; -1 for -1 and for no page.

    >>> places(jnp.array([[0, 17, -1]]), jnp.array([[5, 2]]), 16).tolist()
    [[80, 33, -1]]
    """
    column = jnp.clip(positions // page_size, 0, block_table.shape[1] - 1)
    flat = column.reshape(column.shape[0], -1)
    page = jnp.take_along_axis(block_table, flat, axis=1).reshape(column.shape)
    absent = (positions < 0) | (page < 0)
    return jnp.where(absent, -1, page * page_size + positions % page_size)


def lightning_indexer(
    q: Float[Array, "batch tokens heads width"],
    k: Float[Array, "batch keys width"],
    weights: Float[Array, "batch tokens heads"],
    *,
    topk: int = 2048,
    positions: Int[Array, "batch tokens"] | None = None,
    block_table: Int[Array, "batch pages"] | None = None,
    page_size: int = 64,
) -> Int[Array, "batch tokens topk"]:
    """The keys that each query attends to, as `indices` of `mla_sparse_decode`.

    q, k: the indexer's queries and its keys, one for all heads, both after RoPE, of one dtype;
    width a power of two up to 128. Both are multiplied with the Hadamard matrix times width^-1/2
    and rounded to e4m3, with a float32 scale a vector. Key t's score is
    sum_h w_h relu(q_h . k_t) * k_scale_t, w = weights * heads^-1/2 * width^-1/2 * q_scale, in
    float32. A query sees the keys at and before its position; of these its `topk` best are chosen,
    in any order, whichever among equals, and -1 stands for each one wanting. Keys that no query
    sees may hold anything.

    positions: int32, each query's place among the keys, -1 for padding; None: the last S of the T.
    block_table: int32, each row's pages, the i-th holding its keys from i * page_size on: indices
    are then page * page_size + offset; None: they are positions among the keys.
    Everything but shapes may be traced. Errors: ValueError (shape), TypeError (dtype). Source:
    DeepSeek-V3.2 (arXiv:2512.02556), its Indexer.

    >>> q, k = jnp.ones((1, 2, 4, 128)), jnp.ones((1, 3, 128))
    >>> lightning_indexer(q, k, jnp.ones((1, 2, 4)), topk=3).sort(axis=-1).tolist()
    [[[-1, 0, 1], [0, 1, 2]]]
    """
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: got shape {q.shape}, expected [batch, tokens, heads, width]")
    batch, tokens, _, width = q.shape
    if k.ndim != 3 or (k.shape[0], k.shape[2]) != (batch, width) or k.shape[1] == 0:
        raise ValueError(f"k: got shape {k.shape}, expected [{batch}, keys, {width}]")
    if k.dtype != q.dtype:
        raise TypeError(f"k: got dtype {k.dtype}, expected {q.dtype}, q's")
    if weights.shape != q.shape[:-1]:
        raise ValueError(f"weights: got shape {weights.shape}, expected {q.shape[:-1]}")
    if topk < 1:
        raise ValueError(f"topk: got {topk}, expected at least 1")
    if positions is None:
        last = jnp.arange(tokens, dtype=jnp.int32) + (k.shape[1] - tokens)
        positions = jnp.broadcast_to(last, (batch, tokens))
    if positions.shape != (batch, tokens):
        raise ValueError(f"positions: got shape {positions.shape}, expected {(batch, tokens)}")
    if block_table is not None and (
        block_table.ndim != 2
        or block_table.shape[0] != batch
        or block_table.shape[1] * page_size < k.shape[1]
    ):
        raise ValueError(
            f"block_table: got shape {block_table.shape}, expected [{batch}, pages], with "
            f"{k.shape[1]} keys in pages of {page_size}"
        )
    chosen = select_keys(quantize_vectors(q), quantize_vectors(k), weights, positions, topk)
    return chosen if block_table is None else places(chosen, block_table, page_size)
