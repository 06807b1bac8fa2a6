"""`ref_kernel` against a float64 NumPy walk through contracts' steps, one scalar rule at a time."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_jax.reference import MLAInput, ref_kernel
from mla_jax.reference.intermediates import rope_tables

BF16 = ml_dtypes.bfloat16
DTYPES = ("float32", "bfloat16")
SMALL = {
    "batch_size": 2,
    "hidden_dim": 24,
    "q_lora_dim": 10,
    "n_heads": 3,
    "kv_lora_dim": 12,
    "nope_dim": 6,
    "rope_dim": 8,
    "v_dim": 5,
    "max_seq_len": 320,
}
# Quantile -> largest error, as a fraction of the value's largest magnitude. Where something is
# rounded to bfloat16, oracle and kernel round alike, so they differ only where two summation
# orders straddle a rounding edge.
TOLERANCE = {
    "float32": {0.9: 1e-6, 1.0: 1e-5},
    "mixed": {0.9: 1e-4, 1.0: 2**-8},
    "bfloat16": {0.9: 2**-9, 1.0: 2**-6},
}
jitted = jax.jit(ref_kernel, static_argnames="rope_table")


def small_input(**changes) -> MLAInput:
    return MLAInput.random(**{**SMALL, "prefill": 9, "seed": 0, "dtype": "float32", **changes})


def rounder(dtype: str):
    """A function that rounds float64 values to `dtype` and gives them back as float64."""
    return lambda value: np.asarray(value, np.float64).astype(dtype).astype(np.float64)


def oracle_theta(rope_dim: int, rope_table: str) -> np.ndarray:
    half = rope_dim // 2
    if rope_table == "float32":
        return np.array([10000.0 ** (-i / half) for i in range(half)])
    base = float(BF16(10000.0))
    return np.array([float(BF16(base ** (-i / half))) for i in range(half)])


def oracle_rope(row: np.ndarray, position: int, rope_table: str, to_dtype) -> np.ndarray:
    half = len(row) // 2
    theta = oracle_theta(len(row), rope_table)
    turned = np.empty_like(row)
    for i in range(half):
        if rope_table == "float32":
            product = float
            cos, sin = math.cos(position * theta[i]), math.sin(position * theta[i])
        else:
            product = rounder("bfloat16")
            angle = float(BF16(np.float32(BF16(position)) * np.float32(theta[i])))
            cos, sin = float(BF16(math.cos(angle))), float(BF16(math.sin(angle)))
        first, second = row[i], row[i + half]
        turned[i] = product(first * cos) + product(-second * sin)
        turned[i + half] = product(second * cos) + product(first * sin)
    return to_dtype(turned)


def oracle(inputs: MLAInput, rope_table: str) -> dict[str, np.ndarray]:
    """Every intermediate, with loops over batch, head and token; rounds after each step."""
    to_dtype = rounder(inputs.x.dtype.name)
    x, q_down, q_up, kv_down, kv_up, wo, past = (
        np.asarray(array).astype(np.float64) for array in jax.tree.leaves(inputs)
    )
    prefill, heads = inputs.prefill, inputs.n_heads
    latent, nope, rope, v_dim = inputs.kv_lora_dim, inputs.nope_dim, inputs.rope_dim, inputs.v_dim
    batch, seq, hidden = x.shape
    keys = prefill + seq

    cache = past[:, :keys].copy()
    cache[:, prefill:] = to_dtype(x @ kv_down.T)
    kv_lora, k_rope = cache[:, :, :latent], cache[:, :, latent:]
    q_lora = to_dtype(x @ q_down.T)

    q_rows = [q_up[h * (nope + rope) : (h + 1) * (nope + rope)] for h in range(heads)]
    kv_rows = [kv_up[h * (nope + v_dim) : (h + 1) * (nope + v_dim)] for h in range(heads)]
    qup_nope, qup_rope = np.stack([w[:nope] for w in q_rows]), np.stack([w[nope:] for w in q_rows])
    kup, vup = np.stack([w[:nope] for w in kv_rows]), np.stack([w[nope:] for w in kv_rows])

    q_rope = np.zeros((batch, seq, heads, rope))
    q_nope = np.zeros((batch, seq, heads, nope))
    q_absorb = np.zeros((batch, seq, heads, latent))
    q_turned = np.zeros((batch, heads, seq, rope))
    k_turned = np.zeros((batch, keys, rope))
    attn_nope, attn_rope, scores, attention = (np.zeros((batch, heads, seq, keys)) for _ in "1234")
    o_latent = np.zeros((batch, heads, seq, latent))
    o_heads = np.zeros((batch, heads, seq, v_dim))
    output = np.zeros((batch, seq, hidden))
    for b in range(batch):
        for p in range(keys):
            k_turned[b, p] = oracle_rope(k_rope[b, p], p, rope_table, to_dtype)
        for h in range(heads):
            for s in range(seq):
                q_rope[b, s, h] = to_dtype(qup_rope[h] @ q_lora[b, s])
                q_nope[b, s, h] = to_dtype(qup_nope[h] @ q_lora[b, s])
                q_absorb[b, s, h] = to_dtype(q_nope[b, s, h] @ kup[h])
                query = oracle_rope(q_rope[b, s, h], prefill + s, rope_table, to_dtype)
                q_turned[b, h, s] = query
                attn_nope[b, h, s] = to_dtype(kv_lora[b] @ q_absorb[b, s, h])
                attn_rope[b, h, s] = to_dtype(k_turned[b] @ query)
                total = to_dtype(attn_nope[b, h, s] + attn_rope[b, h, s])
                scores[b, h, s] = to_dtype(total / math.sqrt(nope + rope))
                scores[b, h, s, prefill + s + 1 :] = -np.inf
                powers = np.exp(scores[b, h, s] - scores[b, h, s].max())
                attention[b, h, s] = to_dtype(powers / powers.sum())
                o_latent[b, h, s] = to_dtype(attention[b, h, s] @ kv_lora[b])
                o_heads[b, h, s] = to_dtype(vup[h] @ o_latent[b, h, s])
        for s in range(seq):
            output[b, s] = to_dtype(wo @ o_heads[b, :, s].reshape(-1))

    return {
        "kv_cache_step0_ref": cache,
        "kv_lora_ref": kv_lora,
        "k_rope_ref": k_rope,
        "q_lora_ref": q_lora,
        "qup_nope_ref": qup_nope,
        "qup_rope_ref": qup_rope,
        "kup_nope_ref": kup,
        "vup_ref": vup,
        "q_rope_step2_ref": q_rope,
        "q_nope_ref": q_nope,
        "q_absorb_ref": q_absorb,
        "q_rope_permuted_ref": q_rope.swapaxes(1, 2),
        "q_absorb_permuted_ref": q_absorb.swapaxes(1, 2),
        "theta_ref": oracle_theta(rope, rope_table),
        "q_rope_final_ref": q_turned,
        "k_rope_final_ref": k_turned,
        "attn_nope_ref": attn_nope,
        "attn_rope_ref": attn_rope,
        "scores_ref": scores,
        "attention_ref": attention,
        "o_step4_0_ref": o_latent,
        "o_step4_1_ref": o_heads,
        "output_ref": output,
    }


def assert_close(name: str, got, want: np.ndarray, tolerance: str) -> None:
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape, name
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    error = np.abs(got[finite] - want[finite]) / np.abs(want[finite]).max()
    for quantile, limit in TOLERANCE[tolerance].items():
        assert np.quantile(error, quantile) <= limit, f"{name}: {quantile=} of the error"


@pytest.mark.parametrize("seq_len", [1, 4])
@pytest.mark.parametrize("rope_table", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_step_matches_numpy(dtype, rope_table, seq_len, seed):
    inputs = small_input(seq_len=seq_len, seed=seed, dtype=dtype)
    got = jitted(inputs, rope_table=rope_table)
    want = oracle(inputs, rope_table)
    assert [field.name for field in dataclasses.fields(got)] == list(want)
    for name, value in want.items():
        expected_dtype = rope_table if name == "theta_ref" else dtype
        assert getattr(got, name).dtype == jnp.dtype(expected_dtype), name
        assert_close(name, getattr(got, name), value, dtype if dtype == rope_table else "mixed")


def test_the_tolerance_notices_a_wrong_kernel(seed):
    """Off-by-one prefill, swapped weight halves and a missing scale are each far outside it."""
    inputs = small_input(seed=seed)
    want = oracle(inputs, "float32")["output_ref"]
    halves = jnp.flip(inputs.KV_proj_up_weight, axis=0)
    for wrong in (
        dataclasses.replace(inputs, prefill=inputs.prefill - 1),
        dataclasses.replace(inputs, KV_proj_up_weight=halves),
        dataclasses.replace(inputs, Q_proj_up_weight=2 * inputs.Q_proj_up_weight),
    ):
        with pytest.raises(AssertionError):
            assert_close("output_ref", jitted(wrong).output_ref, want, "float32")


def test_shapes_at_the_seeds_constants():
    values = jax.eval_shape(lambda: ref_kernel(MLAInput.random(prefill=6144)))
    b, s, h, n, hidden, dq, c, nope, rope, v = 128, 1, 128, 6145, 7168, 1536, 512, 128, 64, 128
    expected = {
        "kv_cache_step0_ref": (b, n, c + rope),
        "kv_lora_ref": (b, n, c),
        "k_rope_ref": (b, n, rope),
        "q_lora_ref": (b, s, dq),
        "qup_nope_ref": (h, nope, dq),
        "qup_rope_ref": (h, rope, dq),
        "kup_nope_ref": (h, nope, c),
        "vup_ref": (h, v, c),
        "q_rope_step2_ref": (b, s, h, rope),
        "q_nope_ref": (b, s, h, nope),
        "q_absorb_ref": (b, s, h, c),
        "q_rope_permuted_ref": (b, h, s, rope),
        "q_absorb_permuted_ref": (b, h, s, c),
        "theta_ref": (rope // 2,),
        "q_rope_final_ref": (b, h, s, rope),
        "k_rope_final_ref": (b, n, rope),
        "attn_nope_ref": (b, h, s, n),
        "attn_rope_ref": (b, h, s, n),
        "scores_ref": (b, h, s, n),
        "attention_ref": (b, h, s, n),
        "o_step4_0_ref": (b, h, s, c),
        "o_step4_1_ref": (b, h, s, v),
        "output_ref": (b, s, hidden),
    }
    fields = dataclasses.fields(values)
    assert {field.name: getattr(values, field.name).shape for field in fields} == expected


def test_bfloat16_table_is_bit_exact():
    theta, cos, sin = rope_tables(8192, 64, "bfloat16")
    positions = np.arange(8192, dtype=np.float32).astype(BF16).astype(np.float32)
    want_theta = (9984.0 ** (-np.arange(32) / 32)).astype(BF16)
    angles = (positions[:, None] * want_theta.astype(np.float32)).astype(BF16)
    want_cos = np.cos(angles.astype(np.float64)).astype(BF16)
    want_sin = np.sin(angles.astype(np.float64)).astype(BF16)
    np.testing.assert_array_equal(theta.view(np.uint16), want_theta.view(np.uint16))
    for half in (slice(0, 32), slice(32, 64)):
        np.testing.assert_array_equal(cos[:, half].view(np.uint16), want_cos.view(np.uint16))
        np.testing.assert_array_equal(sin[:, half].view(np.uint16), want_sin.view(np.uint16))
    # The reason for the float32 table: an 8-bit significand cannot count beyond 256.
    np.testing.assert_array_equal(cos[256], cos[257])


def test_float32_table():
    theta, cos, sin = rope_tables(8192, 64, "float32")
    angles = np.arange(8192)[:, None] * 10000.0 ** (-np.arange(32) / 32)
    assert theta.dtype == cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(theta, 10000.0 ** (-np.arange(32) / 32), rtol=1e-7)
    np.testing.assert_allclose(cos, np.tile(np.cos(angles), 2), rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin, np.tile(np.sin(angles), 2), rtol=0, atol=1e-7)


def test_defaults_are_the_seeds_constants():
    parameters = inspect.signature(MLAInput.random).parameters
    constants = {
        "batch_size": 128,
        "hidden_dim": 7168,
        "q_lora_dim": 1536,
        "seq_len": 1,
        "n_heads": 128,
        "kv_lora_dim": 512,
        "nope_dim": 128,
        "rope_dim": 64,
        "v_dim": 128,
        "max_seq_len": 8192,
    }
    assert {name: parameters[name].default for name in constants} == constants
    assert parameters["prefill"].default is inspect.Parameter.empty
    assert inspect.signature(ref_kernel).parameters["rope_table"].default == "float32"


def test_random_draws(seed):
    sizes = {**SMALL, "hidden_dim": 400, "q_lora_dim": 100, "prefill": 9, "seed": seed}
    exact, rounded = (MLAInput.random(**sizes, dtype=dtype) for dtype in DTYPES)
    for name, fan_in in (("x", 1), ("kv_cache", 1), ("Q_proj_down_weight", 400)):
        values = np.asarray(getattr(exact, name))
        assert values.std() * math.sqrt(fan_in) == pytest.approx(1.0, rel=0.15)
        assert abs(values.mean()) * math.sqrt(fan_in) < 0.2
    for name in ("Q_proj_up_weight", "KV_proj_down_weight", "KV_proj_up_weight", "wo_weight"):
        values = np.asarray(getattr(exact, name))
        assert values.std() * math.sqrt(values.shape[1]) == pytest.approx(1.0, rel=0.25)
    for left, right in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(np.asarray(left).astype(BF16), np.asarray(right))
    other = MLAInput.random(**{**sizes, "seed": seed + 1}, dtype="float32")
    assert not np.array_equal(exact.x, other.x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jit_equals_eager(dtype, seed):
    inputs = small_input(seed=seed, seq_len=2, dtype=dtype)
    eager = ref_kernel(inputs, rope_table="bfloat16")
    compiled = jitted(inputs, rope_table="bfloat16")
    for field in dataclasses.fields(eager):
        want = np.asarray(getattr(eager, field.name)).astype(np.float64)
        tolerance = "mixed" if dtype == "float32" else "bfloat16"
        assert_close(field.name, getattr(compiled, field.name), want, tolerance)


def test_products_ask_for_full_precision():
    """A CPU computes float32 products exactly anyway; a GPU would use TF32 unless told not to."""
    program = str(jax.make_jaxpr(ref_kernel)(small_input()))
    assert program.count("dot_general[") == 10
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 10


def test_tokens_at_once_equal_tokens_one_by_one(seed):
    whole = small_input(seed=seed, seq_len=3)
    at_once = jitted(whole)
    step = dataclasses.replace(whole, x=whole.x[:, :1])
    for i in range(3):
        step = dataclasses.replace(step, x=whole.x[:, i : i + 1], prefill=9 + i)
        values = jitted(step)
        np.testing.assert_allclose(
            values.output_ref[:, 0], at_once.output_ref[:, i], rtol=1e-4, atol=1e-5
        )
        cache = step.kv_cache.at[:, : 10 + i].set(values.kv_cache_step0_ref)
        step = dataclasses.replace(step, kv_cache=cache)


def test_rows_beyond_the_prefill_are_not_read(seed):
    inputs = small_input(seed=seed)
    poisoned = dataclasses.replace(inputs, kv_cache=inputs.kv_cache.at[:, 9:].set(jnp.nan))
    np.testing.assert_array_equal(jitted(poisoned).output_ref, jitted(inputs).output_ref)


def test_a_full_cache_and_an_empty_one_are_legal(seed):
    empty = jitted(small_input(seed=seed, prefill=0))
    np.testing.assert_array_equal(empty.attention_ref, np.ones((2, 3, 1, 1)))
    full = jitted(small_input(seed=seed, prefill=319))
    assert full.attention_ref.shape == (2, 3, 1, 320)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prefill": 320}, ValueError, "prefill: got 320, expected at most max_seq_len=320"),
        ({"prefill": -1}, ValueError, "prefill: got -1"),
        ({"seq_len": 0}, ValueError, "seq_len: got 0"),
        ({"n_heads": -2}, ValueError, "n_heads: got -2"),
        ({"rope_dim": 7}, ValueError, "rope_dim: got 7, expected an even"),
        ({"dtype": "float16"}, TypeError, "dtype: got 'float16'"),
        ({"dtype": "no such dtype"}, TypeError, "dtype: got 'no such dtype'"),
    ],
)
def test_random_rejects(changes, error, message):
    with pytest.raises(error, match=message):
        small_input(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prefill": 320}, ValueError, "prefill: got 320"),
        ({"prefill": -1}, ValueError, "prefill: got -1"),
        ({"n_heads": 0}, ValueError, "n_heads: got 0"),
        (
            {"n_heads": 4},
            ValueError,
            r"Q_proj_up_weight: got shape \(42, 10\), expected \(56, 10\)",
        ),
        ({"rope_dim": 3}, ValueError, "rope_dim: got 3"),
        ({"x": jnp.zeros((2, 24))}, ValueError, r"x: got shape \(2, 24\), expected 3 dimensions"),
        ({"x": jnp.zeros((2, 1, 25))}, ValueError, "Q_proj_down_weight: got shape"),
        ({"wo_weight": jnp.zeros((24, 16))}, ValueError, "wo_weight: got shape"),
        ({"kv_cache": jnp.zeros((1, 320, 20))}, ValueError, "kv_cache: got shape"),
        ({"wo_weight": jnp.zeros((24, 15), jnp.bfloat16)}, TypeError, "wo_weight: got bfloat16"),
        ({"x": jnp.zeros((2, 1, 24), jnp.float16)}, TypeError, "x: got"),
    ],
)
def test_ref_kernel_rejects(changes, error, message):
    with pytest.raises(error, match=message):
        ref_kernel(dataclasses.replace(small_input(), **changes))


def test_ref_kernel_rejects_an_unknown_table():
    with pytest.raises(ValueError, match="rope_table: got 'float64', expected one of"):
        ref_kernel(small_input(), rope_table="float64")
