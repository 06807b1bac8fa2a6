"""`ref_layer` against a float64 NumPy layer that keeps full keys and values, token by token."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.reference import (
    LayerWeights,
    mla_softmax_scale,
    precompute_freqs_cis,
    ref_layer,
    yarn_correction_range,
)

BATCH, SEQ, DIM, HEADS, LATENT, NOPE, ROPE, V, Q_LORA = 2, 5, 20, 3, 12, 6, 8, 7, 9
CONSTANTS: dict[str, Any] = {
    "n_heads": HEADS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": V,
}
TRACE_NAMES = [
    *("q_lora", "q", "q_heads", "q_nope", "q_pe", "q_pe_rotated"),
    *("kv", "kv_latent", "kv_latent_normed", "k_pe", "k_pe_rotated", "k", "v", "q_absorbed"),
    *("scores", "probs", "latent_output", "head_output", "out", "caches"),
]
# Largest error, as a fraction of the value's largest magnitude; the oracle does not round.
TOLERANCE = {"float32": 5e-6, "bfloat16": 3e-2}


def make_weights(rng: np.random.Generator, *, q_lora: bool, dtype: str) -> LayerWeights:
    def matrix(out_dim: int, in_dim: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((out_dim, in_dim)) / math.sqrt(in_dim), dtype)

    def gain(width: int) -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 1.5, width), dtype)

    queries = (
        {
            "wq_a": matrix(Q_LORA, DIM),
            "q_norm": gain(Q_LORA),
            "wq_b": matrix(HEADS * (NOPE + ROPE), Q_LORA),
        }
        if q_lora
        else {"wq": matrix(HEADS * (NOPE + ROPE), DIM)}
    )
    return LayerWeights(
        **queries,
        wkv_a=matrix(LATENT + ROPE, DIM),
        kv_norm=gain(LATENT),
        wkv_b=matrix(HEADS * (NOPE + V), LATENT),
        wo=matrix(DIM, HEADS * V),
    )


def make_x(rng: np.random.Generator, dtype: str = "float32", seq: int = SEQ) -> jax.Array:
    return jnp.asarray(rng.standard_normal((BATCH, seq, DIM)), dtype)


def table(start: int = 0, seq: int = SEQ) -> jax.Array:
    return precompute_freqs_cis(start + seq, qk_rope_head_dim=ROPE)[start:]


def oracle_norm(row: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return row / math.sqrt(sum(value * value for value in row) / len(row) + 1e-6) * gain


def oracle_rotate(row: np.ndarray, position: int) -> np.ndarray:
    turned = np.empty_like(row)
    for i in range(0, len(row), 2):
        angle = position * 10000.0 ** (-i / len(row))
        turned[i] = row[i] * math.cos(angle) - row[i + 1] * math.sin(angle)
        turned[i + 1] = row[i] * math.sin(angle) + row[i + 1] * math.cos(angle)
    return turned


def oracle(x, weights: LayerWeights, scale: float) -> dict[str, np.ndarray]:
    """Every named value of both forms for a prompt from position 0."""
    x = np.asarray(x).astype(np.float64)
    given = {
        field.name: np.asarray(getattr(weights, field.name)).astype(np.float64)
        for field in dataclasses.fields(weights)
        if getattr(weights, field.name) is not None
    }
    batch, seq, _ = x.shape
    shapes = {
        "q_lora": (Q_LORA,),
        "q": (HEADS * (NOPE + ROPE),),
        "q_heads": (HEADS, NOPE + ROPE),
        "q_nope": (HEADS, NOPE),
        "q_pe": (HEADS, ROPE),
        "q_pe_rotated": (HEADS, ROPE),
        "kv": (LATENT + ROPE,),
        "kv_latent": (LATENT,),
        "kv_latent_normed": (LATENT,),
        "k_pe": (ROPE,),
        "k_pe_rotated": (1, ROPE),
        "k": (HEADS, NOPE + ROPE),
        "v": (HEADS, V),
        "q_absorbed": (HEADS, LATENT),
        "scores": (HEADS, seq),
        "probs": (HEADS, seq),
        "latent_output": (HEADS, LATENT),
        "head_output": (HEADS, V),
        "out": (DIM,),
    }
    want = {name: np.zeros((batch, seq, *shape)) for name, shape in shapes.items()}
    for b in range(batch):
        for t in range(seq):
            row = {name: value[b, t] for name, value in want.items()}
            if "wq" in given:
                row["q"][:] = given["wq"] @ x[b, t]
            else:
                row["q_lora"][:] = oracle_norm(given["wq_a"] @ x[b, t], given["q_norm"])
                row["q"][:] = given["wq_b"] @ row["q_lora"]
            row["kv"][:] = given["wkv_a"] @ x[b, t]
            row["kv_latent"][:] = row["kv"][:LATENT]
            row["kv_latent_normed"][:] = oracle_norm(row["kv_latent"], given["kv_norm"])
            row["k_pe"][:] = row["kv"][LATENT:]
            row["k_pe_rotated"][0] = oracle_rotate(row["k_pe"], t)
            for h in range(HEADS):
                w_key = given["wkv_b"][h * (NOPE + V) :][:NOPE]
                w_value = given["wkv_b"][h * (NOPE + V) + NOPE :][:V]
                row["q_heads"][h] = row["q"][h * (NOPE + ROPE) :][: NOPE + ROPE]
                row["q_nope"][h], row["q_pe"][h] = np.split(row["q_heads"][h], [NOPE])
                row["q_pe_rotated"][h] = oracle_rotate(row["q_pe"][h], t)
                row["k"][h, :NOPE] = w_key @ row["kv_latent_normed"]
                row["k"][h, NOPE:] = row["k_pe_rotated"][0]
                row["v"][h] = w_value @ row["kv_latent_normed"]
                row["q_absorbed"][h] = row["q_nope"][h] @ w_key
                query = np.concatenate([row["q_nope"][h], row["q_pe_rotated"][h]])
                scores = np.array([query @ want["k"][b, past, h] for past in range(t + 1)]) * scale
                probs = np.exp(scores - scores.max())
                probs /= probs.sum()
                row["scores"][h] = [*scores, *[-np.inf] * (seq - t - 1)]
                row["probs"][h, : t + 1] = probs
                row["latent_output"][h] = probs @ want["kv_latent_normed"][b, : t + 1]
                row["head_output"][h] = probs @ want["v"][b, : t + 1, h]
            row["out"][:] = given["wo"] @ row["head_output"].reshape(-1)
    return want


def assert_close(name: str, got, want, limit: float) -> None:
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape, name
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    error = np.abs(got[finite] - want[finite]).max() / np.abs(want[finite]).max()
    assert error <= limit, f"{name}: {error=}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("q_lora", [False, True])
@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
def test_every_value_matches_numpy(attn_impl, q_lora, dtype, rng):
    weights = make_weights(rng, q_lora=q_lora, dtype=dtype)
    x = make_x(rng, dtype)
    trace = ref_layer(
        x, weights, freqs_cis=table(), softmax_scale=0.3, attn_impl=attn_impl, **CONSTANTS
    )
    absent = {"q_absorbed", "latent_output"} if attn_impl == "naive" else {"k", "v"}
    absent |= set() if q_lora else {"q_lora"}
    want = oracle(x, weights, 0.3)
    assert [field.name for field in dataclasses.fields(trace)] == [*want, "caches"] == TRACE_NAMES
    for name, value in want.items():
        got = getattr(trace, name)
        if name in absent:
            assert got is None, name
        else:
            assert got.dtype == jnp.dtype(dtype), name
            assert_close(name, got, value, TOLERANCE[dtype])
    cached = ("k", "v") if attn_impl == "naive" else ("kv_latent_normed", "k_pe_rotated")
    for cache, name in zip(trace.caches, cached, strict=True):
        rows = want[name][:, :, 0] if name == "k_pe_rotated" else want[name]
        assert cache.dtype == jnp.dtype(dtype)
        assert_close(f"cache of {name}", cache, rows, TOLERANCE[dtype])


@pytest.mark.parametrize("q_lora", [False, True])
def test_naive_equals_absorb(q_lora, rng):
    weights = make_weights(rng, q_lora=q_lora, dtype="float32")
    x = make_x(rng)
    naive, absorb = (
        ref_layer(x, weights, freqs_cis=table(), attn_impl=impl, **CONSTANTS)
        for impl in ("naive", "absorb")
    )
    for name in ("scores", "probs", "head_output", "out"):
        assert_close(name, getattr(naive, name), getattr(absorb, name), 1e-5)


@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
def test_chunks_equal_the_whole(attn_impl, rng):
    """Chunks of 2, 1 and 2 tokens, in a cache longer than the prompt whose spare rows are NaN."""
    weights = make_weights(rng, q_lora=True, dtype="float32")
    x = make_x(rng)
    options: dict[str, Any] = {"attn_impl": attn_impl, **CONSTANTS}
    whole = ref_layer(x, weights, freqs_cis=table(), **options)
    capacity = SEQ + 3
    first, second = (
        jnp.full((BATCH, capacity, *cache.shape[2:]), jnp.nan) for cache in whole.caches
    )
    caches = (first, second)
    outputs = []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        trace = ref_layer(
            x[:, start:end],
            weights,
            freqs_cis=table(start, end - start),
            start_pos=start,
            caches=caches,
            **options,
        )
        assert trace.probs.shape == (BATCH, end - start, HEADS, end)
        caches = trace.caches
        outputs.append(trace.out)
    assert_close("out", jnp.concatenate(outputs, axis=1), whole.out, 1e-5)
    for chunked, full in zip(caches, whole.caches, strict=True):
        assert_close("cache", chunked[:, :SEQ], full, 1e-6)
        assert jnp.isnan(chunked[:, SEQ:]).all()


def test_trace_shapes_of_the_seed():
    """x [2, 4, 2048], 16 heads, no query compression: the walk-through's diagrams."""

    def layer(attn_impl):
        weights = LayerWeights(
            wq=jnp.zeros((3072, 2048), jnp.bfloat16),
            wkv_a=jnp.zeros((576, 2048), jnp.bfloat16),
            kv_norm=jnp.zeros(512, jnp.bfloat16),
            wkv_b=jnp.zeros((4096, 512), jnp.bfloat16),
            wo=jnp.zeros((2048, 2048), jnp.bfloat16),
        )
        x, freqs_cis = jnp.zeros((2, 4, 2048), jnp.bfloat16), precompute_freqs_cis(4)
        assert freqs_cis.shape == (4, 32)
        assert freqs_cis.dtype == jnp.complex64
        return ref_layer(x, weights, freqs_cis=freqs_cis, n_heads=16, attn_impl=attn_impl)

    absorb, naive = (jax.eval_shape(partial(layer, impl)) for impl in ("absorb", "naive"))
    shapes = {
        "q": (2, 4, 3072),
        "q_heads": (2, 4, 16, 192),
        "q_nope": (2, 4, 16, 128),
        "q_pe": (2, 4, 16, 64),
        "q_pe_rotated": (2, 4, 16, 64),
        "kv": (2, 4, 576),
        "kv_latent": (2, 4, 512),
        "kv_latent_normed": (2, 4, 512),
        "k_pe": (2, 4, 64),
        "k_pe_rotated": (2, 4, 1, 64),
        "scores": (2, 4, 16, 4),
        "probs": (2, 4, 16, 4),
        "head_output": (2, 4, 16, 128),
        "out": (2, 4, 2048),
    }
    for trace in (absorb, naive):
        assert {name: getattr(trace, name).shape for name in shapes} == shapes
    assert absorb.q_absorbed.shape == absorb.latent_output.shape == (2, 4, 16, 512)
    assert [cache.shape for cache in absorb.caches] == [(2, 4, 512), (2, 4, 64)]
    assert naive.k.shape == (2, 4, 16, 192)
    assert naive.v.shape == (2, 4, 16, 128)
    assert [cache.shape for cache in naive.caches] == [(2, 4, 16, 192), (2, 4, 16, 128)]


def test_default_scale_and_jit(rng):
    weights, x = make_weights(rng, q_lora=False, dtype="float32"), make_x(rng)

    @jax.jit
    def run(x, weights, freqs_cis):
        return ref_layer(x, weights, freqs_cis=freqs_cis, **CONSTANTS)

    eager = ref_layer(
        x, weights, freqs_cis=table(), softmax_scale=(NOPE + ROPE) ** -0.5, **CONSTANTS
    )
    compiled = run(x, weights, table())
    for left, right in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        assert_close("value", left, right, 1e-5)


def test_scaled_tables_scale_the_rotation(rng):
    """A Hugging Face attention factor on cos and sin reaches queries and keys alike."""
    weights, x = make_weights(rng, q_lora=False, dtype="float32"), make_x(rng)
    plain = ref_layer(x, weights, freqs_cis=table(), **CONSTANTS)
    scaled = ref_layer(x, weights, freqs_cis=table() * jnp.complex64(1.5), **CONSTANTS)
    assert_close("q_pe", scaled.q_pe_rotated, 1.5 * plain.q_pe_rotated, 1e-6)
    assert_close("k_pe", scaled.k_pe_rotated, 1.5 * plain.k_pe_rotated, 1e-6)


def oracle_frequency(pair: int, *, yarn: bool) -> float:
    frequency = 10000.0 ** (-pair / 32)
    if not yarn:
        return frequency
    ramp = min(max((pair - 10) / (23 - 10), 0.0), 1.0)
    return frequency / 40 * ramp + frequency * (1 - ramp)


@pytest.mark.parametrize(("length", "yarn"), [(4096, False), (4097, True), (16384, True)])
def test_freqs_cis(length, yarn):
    freqs_cis = np.asarray(precompute_freqs_cis(length))
    assert freqs_cis.shape == (length, 32)
    assert freqs_cis.dtype == np.complex64
    for position in (0, 1, 7, 1000, length - 1):
        for pair in range(32):
            angle = position * oracle_frequency(pair, yarn=yarn)
            want = complex(math.cos(angle), math.sin(angle))
            assert abs(freqs_cis[position, pair] - want) < 1e-6


def test_yarn_numbers():
    assert yarn_correction_range() == (10.0, 23.0)
    # Few pairs: both ends clamp to the table, and equal ends are kept apart.
    assert yarn_correction_range(original_seq_len=6, beta_fast=32.0, beta_slow=1.0) == (
        0.0,
        0.0 + 1e-3,
    )
    assert yarn_correction_range(original_seq_len=2**40, beta_fast=1e-30)[1] == 63.0
    assert mla_softmax_scale() == pytest.approx(0.0721687836, abs=1e-10)
    assert mla_softmax_scale(rope_factor=40.0, mscale=0.707) == pytest.approx(
        0.1147213868, abs=1e-10
    )
    assert mla_softmax_scale(rope_factor=40.0) == pytest.approx(0.1352337789, abs=1e-10)
    assert mla_softmax_scale(64) == 0.125


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attn_impl": "flash"}, ValueError, "attn_impl: got 'flash'"),
        ({"start_pos": -1}, ValueError, "start_pos: got -1"),
        ({"start_pos": 3}, ValueError, "caches: got None, expected the 3 tokens"),
        ({"n_heads": 2}, ValueError, r"wkv_b: got shape \(39, 12\), expected \(26, 12\)"),
        ({"v_head_dim": 8}, ValueError, "wkv_b: got shape"),
        ({"qk_rope_head_dim": 6}, ValueError, "freqs_cis: got shape"),
        ({"freqs_cis": jnp.ones((5, 4))}, TypeError, "freqs_cis"),
        (
            {"caches": (jnp.ones((2, 4, 12)), jnp.ones((2, 4, 8)))},
            ValueError,
            "caches: got room for 4 tokens, expected at least 5",
        ),
        (
            {"caches": (jnp.ones((2, 9, 12)), jnp.ones((2, 9, 7)))},
            ValueError,
            r"caches\[1\]: got shape \(2, 9, 7\), expected \(2, 9, 8\)",
        ),
        (
            {"caches": (jnp.ones((2, 9, 12)), jnp.ones((2, 9, 8), jnp.bfloat16))},
            TypeError,
            r"caches\[1\]: got bfloat16",
        ),
    ],
)
def test_rejects_arguments(changes, error, message, rng):
    weights, x = make_weights(rng, q_lora=True, dtype="float32"), make_x(rng)
    with pytest.raises(error, match=message):
        ref_layer(x, weights, **(CONSTANTS | {"freqs_cis": table()} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"wq": jnp.ones((42, 20))},
            ValueError,
            r"weights: got \['wq', 'wq_a', 'q_norm', 'wq_b'\]",
        ),
        ({"wq_b": None}, ValueError, r"weights: got \['wq_a', 'q_norm'\] for queries"),
        ({"wq_b": jnp.ones((42, 8))}, ValueError, r"wq_b: got shape \(42, 8\), expected \(42, 9\)"),
        ({"q_norm": jnp.ones(8)}, ValueError, "q_norm: got shape"),
        ({"kv_norm": jnp.ones(20)}, ValueError, "kv_norm: got shape"),
        ({"wkv_a": jnp.ones((20, 21))}, ValueError, "wkv_a: got shape"),
        ({"wo": jnp.ones((20, 21), jnp.bfloat16)}, TypeError, "wo: got bfloat16, expected float32"),
    ],
)
def test_rejects_weights(changes, error, message, rng):
    weights, x = make_weights(rng, q_lora=True, dtype="float32"), make_x(rng)
    with pytest.raises(error, match=message):
        ref_layer(x, dataclasses.replace(weights, **changes), freqs_cis=table(), **CONSTANTS)


def test_odd_rope_is_rejected():
    with pytest.raises(ValueError, match="qk_rope_head_dim: got 7, expected an even number"):
        precompute_freqs_cis(4, qk_rope_head_dim=7)
