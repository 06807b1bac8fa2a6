"""The lightning indexer against the float64 oracle, part by part and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from index_choice import check_choice, hadamard_matrix, make, scores_of
from oracles import QUICK_COMPILE, assert_within, float64

from mla_jax import MLAConfig, lightning_indexer
from mla_jax.indexer import hadamard, index_scores, places, quantize_vectors
from mla_jax.nn import Indexer
from mla_jax.nn.norm import LayerNorm
from mla_jax.rope import rotation

# Most scores are exact but for float32's rounding; where a value lies so near to the middle of two
# e4m3 numbers that float32 rounds it the other way, one term of a score moves by 1/16.
SCORES = {0.4: 1e-5, 1.0: 0.2}


def indexed(**options):
    def run(*args, **arrays):
        return lightning_indexer(*args, **options, **arrays)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize("width", [1, 2, 64, 128])
def test_hadamard(rng, width):
    x = rng.standard_normal((3, 5, width)).astype(np.float32)
    want = x.astype(np.float64) @ hadamard_matrix(width) / np.sqrt(width)
    assert_within(hadamard(jnp.asarray(x)), want, {1.0: 2e-6})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "width"), [(4, 128), (64, 128), (3, 64)])
def test_scores(rng, heads, width, dtype):
    q, k, weights = make(rng, heads=heads, width=width, dtype=dtype)
    got = index_scores(quantize_vectors(q[:, 1]), quantize_vectors(k), weights[:, 1])
    want = scores_of(q, k, weights)[:, 1]
    if dtype == "float32":
        assert_within(got, want, SCORES)
    else:  # where a largest value is rounded the other way, so is all of its vector
        worst = np.abs(want).max()
        assert_within(got, want, {0.5: 2e-2 * worst, 1.0: 8e-2 * worst})


@pytest.mark.parametrize(("keys", "topk"), [(40, 8), (40, 64), (5, 5), (200, 128)])
def test_choice(rng, keys, topk):
    """Fewer keys than asked for, more, and as many; the first queries see few."""
    q, k, weights = make(rng, keys=keys)
    chosen = indexed(topk=topk)(q, k, weights)
    positions = np.broadcast_to(np.arange(keys - 5, keys), (2, 5))
    check_choice(chosen, scores_of(q, k, weights), positions, topk)


def test_positions_and_unused_keys(rng):
    """Rows of different lengths, a padding query, and NaN in the keys that nobody sees."""
    q, k, weights = make(rng)
    positions = np.array([[0, 1, 20, 21, -1], [35, 36, 37, 38, 39]])
    scores = scores_of(q, k, weights)
    k = k.at[0, 22:].set(jnp.nan)
    chosen = indexed(topk=16)(q, k, weights, positions=jnp.asarray(positions, jnp.int32))
    check_choice(chosen, scores, positions, 16)


def test_a_query_at_a_time(rng, monkeypatch):
    """Many queries, in steps of which the last is short."""
    monkeypatch.setattr("mla_jax.indexer.SCORES_PER_STEP", 3 * 2 * 4 * 40)
    q, k, weights = make(rng, tokens=8)
    positions = np.broadcast_to(np.arange(32, 40), (2, 8))
    check_choice(indexed(topk=16)(q, k, weights), scores_of(q, k, weights), positions, 16)


def test_places_in_pages(rng):
    """Keys in pages, in any order; a row's missing page gives no key."""
    q, k, weights = make(rng)
    table = jnp.asarray([[7, 3, 0], [4, -1, 6]], jnp.int32)
    chosen = np.asarray(indexed(topk=16)(q, k, weights))
    placed = np.asarray(indexed(topk=16, block_table=table, page_size=16)(q, k, weights))
    pages = np.asarray(table)
    for row in np.ndindex(chosen.shape):
        at = int(chosen[row])
        page = -1 if at < 0 else int(pages[row[0], at // 16])
        assert placed[row] == (-1 if page < 0 else page * 16 + at % 16)
    assert (placed[1] == -1).sum() > (chosen[1] == -1).sum()


def test_places_of_one_axis():
    table = jnp.array([[5, 2], [1, -1]])
    positions = jnp.array([[31, -1, 0], [16, 15, 40]])
    assert places(positions, table, 16).tolist() == [[47, -1, 80], [-1, 31, -1]]


CONFIG = MLAConfig(
    dim=48,
    n_heads=2,
    q_lora_rank=40,
    qk_rope_head_dim=64,
    index_n_heads=4,
    index_head_dim=128,
    index_topk=64,
    dtype="float32",
)


def test_module(rng, seed):
    """From a layer's inputs to the choice: projections, LayerNorm, RoPE by halves, scores."""
    indexer = drawn(lambda: Indexer(CONFIG, rngs=nnx.Rngs(0)), seed)
    x, q_lora = (rng.standard_normal((2, 90, width)).astype(np.float32) for width in (48, 40))
    positions = jnp.broadcast_to(jnp.arange(90, dtype=jnp.int32), (2, 90))
    rope = rotation(CONFIG, positions)

    weight = {
        ".".join(map(str, path)): float64(value[...])
        for path, value in nnx.to_flat_state(nnx.state(indexer))
    }
    q = (q_lora @ weight["wq_b.weight"].T).reshape(2, 90, 4, 128)
    k = x @ weight["wk.weight"].T
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * weight["k_norm.weight"] + weight["k_norm.bias"]

    def turned(vector, position):
        angle = position * 10000.0 ** (-np.arange(32) / 32)
        a, b = vector[..., :32], vector[..., 32:64]
        return np.concatenate(
            [
                a * np.cos(angle) - b * np.sin(angle),
                a * np.sin(angle) + b * np.cos(angle),
                vector[..., 64:],
            ],
            axis=-1,
        )

    for at in range(90):
        q[:, at], k[:, at] = turned(q[:, at], at), turned(k[:, at], at)
    heads = x @ weight["weights_proj.weight"].T

    got = jax.jit(indexer.project)(jnp.asarray(x), jnp.asarray(q_lora), rope)
    for ours, theirs in zip(got, (q, k, heads), strict=True):
        assert_within(ours, theirs, {1.0: 5e-5})
    chosen = jax.jit(indexer)(jnp.asarray(x), jnp.asarray(q_lora), rope)
    check_choice(chosen, scores_of(q, k, heads), np.asarray(positions), 64)


def test_layer_norm(rng):
    norm = LayerNorm(6, "bfloat16", eps=0.5)
    norm.weight[...] = jnp.asarray(rng.uniform(0.5, 1.5, 6), jnp.bfloat16)
    norm.bias[...] = jnp.asarray(rng.standard_normal(6), jnp.bfloat16)
    x = jnp.asarray(3 + rng.standard_normal((4, 6)), jnp.bfloat16)
    wide = float64(x)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.5)
    want = want * float64(norm.weight[...]) + float64(norm.bias[...])
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_less(np.abs(float64(got) - want), 2**-8 * np.abs(want) + 1e-5)


REFUSED = [
    ({"q": jnp.ones((2, 5, 128))}, r"q: got shape \(2, 5, 128\), expected \[batch, tokens, heads"),
    ({"k": jnp.ones((2, 40, 64))}, r"k: got shape \(2, 40, 64\), expected \[2, keys, 128\]"),
    ({"k": jnp.ones((3, 40, 128))}, r"k: got shape \(3, 40, 128\), expected \[2, keys, 128\]"),
    ({"weights": jnp.ones((2, 5))}, r"weights: got shape \(2, 5\), expected \(2, 5, 4\)"),
    ({"topk": 0}, "topk: got 0, expected at least 1"),
    ({"positions": jnp.zeros(5, jnp.int32)}, r"positions: got shape \(5,\), expected \(2, 5\)"),
    ({"block_table": jnp.zeros((2, 0), jnp.int32)}, r"block_table: got shape \(2, 0\), expected"),
    ({"block_table": jnp.zeros((3, 1), jnp.int32)}, r"block_table: got shape \(3, 1\), expected"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refusals(change, message):
    args = {"q": jnp.ones((2, 5, 4, 128)), "k": jnp.ones((2, 40, 128))}
    args |= {"weights": jnp.ones((2, 5, 4))}
    with pytest.raises(ValueError, match=f"^{message}"):
        lightning_indexer(**args | change)


def test_widths_that_have_no_transform():
    with pytest.raises(ValueError, match=r"^x: got a last axis of 96, expected a power of two"):
        quantize_vectors(jnp.ones((2, 96)))
    with pytest.raises(ValueError, match=r"^x: got a last axis of 256, expected at most 128"):
        quantize_vectors(jnp.ones((2, 256)))


def test_keys_of_another_dtype():
    with pytest.raises(TypeError, match=r"^k: got dtype float32, expected bfloat16, q's"):
        lightning_indexer(
            jnp.ones((1, 1, 2, 128), "bfloat16"), jnp.ones((1, 3, 128)), jnp.ones((1, 1, 2))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_n_heads": -1}, "index_n_heads: got -1, expected 0"),
        ({"index_head_dim": 96}, "index_head_dim: got 96, expected a power of two from"),
        ({"index_head_dim": 256}, "index_head_dim: got 256, expected a power of two from"),
        ({"index_head_dim": 32}, "index_head_dim: got 32, expected a power of two from"),
        ({"index_topk": 100}, "index_topk: got 100, expected a multiple of 64"),
        ({"q_lora_rank": 0}, "q_lora_rank: got 0 with an indexer, expected a positive"),
    ],
)
def test_config_refusals(change, message):
    fields = {"dim": 48, "n_heads": 2, "q_lora_rank": 40, "index_n_heads": 4}
    with pytest.raises(ValueError, match=f"^{message}"):
        MLAConfig(**fields | change)
