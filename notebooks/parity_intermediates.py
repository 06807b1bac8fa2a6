# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # Every intermediate of one MLA step, checked against NumPy
#
# `mla_jax.reference.ref_kernel` runs one absorbed Multi-head Latent Attention step and keeps each
# of its 23 intermediate values, so that a kernel author can find the first step that is wrong.
# Such a yardstick has to be right itself. This notebook computes the same values a second time, in
# NumPy and float64, and compares them in both dtypes and with both rotary tables.
#
# In bfloat16 the NumPy walk rounds after every step, as the reference promises to do. What is left
# is the order of summation, which shows only where a sum lands next to a rounding edge.

# %%
import dataclasses
import itertools
import os

os.environ.setdefault("NPROC", "16")  # the interpreter of Mosaic GPU blocks a thread a warpgroup

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

from mla_jax import mla_paged_decode
from mla_jax.reference import MLAInput, ref_kernel
from pallas_kernels.backend import KNOWN

DTYPES = ("float32", "bfloat16")
SEED = 0
# The head sizes of record; fewer heads and a smaller model, so that a CPU needs seconds. The
# prefill is beyond 256, where bfloat16 positions begin to merge; several new tokens need a mask.
SHAPES = {"batch_size": 2, "hidden_dim": 384, "q_lora_dim": 96, "n_heads": 4, "max_seq_len": 400}
PREFILL, NEW_TOKENS = 300, 3

# %% [markdown]
# ## The steps, once more
#
# Weights are [out, in]; a cache row is latent | rope. The letters are those of the documents:
# batch b, new token s, key p, head h, latent l.


# %%
def numpy_rope(x, positions, rope_table, rounded):
    """Half-split rotation of the last axis; x is [..., token, rope]."""
    half = x.shape[-1] // 2
    exponents = -np.arange(half) / half
    if rope_table == "float32":
        theta = 10000.0**exponents
        angles = np.outer(positions, theta)
        cos, sin, product = np.cos(angles), np.sin(angles), np.asarray
    else:
        product = rounder("bfloat16")
        theta = product(float(ml_dtypes.bfloat16(10000)) ** exponents)
        angles = product(np.outer(product(positions), theta))
        cos, sin = product(np.cos(angles)), product(np.sin(angles))
    left, right = x[..., :half], x[..., half:]
    turned = np.concatenate(
        [product(left * cos) - product(right * sin), product(right * cos) + product(left * sin)],
        axis=-1,
    )
    return theta, rounded(turned)


def rounder(dtype):
    """Rounding to `dtype`, with the result back in float64."""
    return lambda value: np.asarray(value, np.float64).astype(dtype).astype(np.float64)


def numpy_intermediates(inputs, rope_table):
    """Seed 000 in float64, rounded to the inputs' dtype after each step."""
    rounded = rounder(inputs.x.dtype)
    x, q_down, q_up, kv_down, kv_up, wo, past = (
        np.asarray(array).astype(np.float64) for array in jax.tree.leaves(inputs)
    )
    prefill, heads, latent, nope = (
        inputs.prefill,
        inputs.n_heads,
        inputs.kv_lora_dim,
        inputs.nope_dim,
    )
    keys = prefill + x.shape[1]
    value = {}

    cache = np.concatenate([past[:, :prefill], rounded(x @ kv_down.T)], axis=1)
    kv_lora, k_rope = cache[..., :latent], cache[..., latent:]
    value |= {"kv_cache_step0_ref": cache, "kv_lora_ref": kv_lora, "k_rope_ref": k_rope}

    value["q_lora_ref"] = q_lora = rounded(x @ q_down.T)

    q_up = q_up.reshape(heads, nope + inputs.rope_dim, -1)
    kv_up = kv_up.reshape(heads, nope + inputs.v_dim, -1)
    value["qup_nope_ref"], value["qup_rope_ref"] = q_up[:, :nope], q_up[:, nope:]
    value["kup_nope_ref"], value["vup_ref"] = k_up, v_up = kv_up[:, :nope], kv_up[:, nope:]
    query = rounded(np.einsum("bsl,hdl->bshd", q_lora, q_up))
    q_nope, q_rope = query[..., :nope], query[..., nope:]
    q_absorb = rounded(np.einsum("bshd,hdl->bshl", q_nope, k_up))
    value |= {"q_rope_step2_ref": q_rope, "q_nope_ref": q_nope, "q_absorb_ref": q_absorb}

    q_rope, q_absorb = q_rope.swapaxes(1, 2), q_absorb.swapaxes(1, 2)
    theta, q_turned = numpy_rope(q_rope, np.arange(prefill, keys), rope_table, rounded)
    _, k_turned = numpy_rope(k_rope, np.arange(keys), rope_table, rounded)
    value |= {"q_rope_permuted_ref": q_rope, "q_absorb_permuted_ref": q_absorb}
    value |= {"theta_ref": theta, "q_rope_final_ref": q_turned, "k_rope_final_ref": k_turned}

    attn_nope = rounded(np.einsum("bhsl,bpl->bhsp", q_absorb, kv_lora))
    attn_rope = rounded(np.einsum("bhsd,bpd->bhsp", q_turned, k_turned))
    scores = rounded(rounded(attn_nope + attn_rope) / np.sqrt(nope + inputs.rope_dim))
    later = np.arange(keys) > prefill + np.arange(x.shape[1])[:, None]
    scores[..., later] = -np.inf
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attention = rounded(powers / powers.sum(axis=-1, keepdims=True))
    value |= {"attn_nope_ref": attn_nope, "attn_rope_ref": attn_rope}
    value |= {"scores_ref": scores, "attention_ref": attention}

    o_latent = rounded(np.einsum("bhsp,bpl->bhsl", attention, kv_lora))
    o_heads = rounded(np.einsum("bhsl,hvl->bhsv", o_latent, v_up))
    output = rounded(np.einsum("bhsv,dhv->bsd", o_heads, wo.reshape(-1, heads, inputs.v_dim)))
    value |= {"o_step4_0_ref": o_latent, "o_step4_1_ref": o_heads, "output_ref": output}
    return value


# %% [markdown]
# ## Compare
#
# The error of a value is its largest deviation, and the 0.9 quantile of the deviations, as a
# fraction of the value's largest magnitude. Float32 has to agree to about one part in a million.
# Wherever something is rounded to bfloat16, one unit in the last place is 2⁻⁸ of a number, and
# few elements may differ at all.

# %%
# (dtype, table) -> (limit of the 0.9 quantile, limit of the maximum)
LIMITS = {
    ("float32", "float32"): (2e-6, 2e-5),
    ("float32", "bfloat16"): (2e-4, 2**-8),
    ("bfloat16", "float32"): (2**-9, 2**-6),
    ("bfloat16", "bfloat16"): (2**-9, 2**-6),
}


def step_errors(values, expected):
    """Name -> (0.9 quantile, maximum) of the relative deviation of each intermediate."""
    names = [field.name for field in dataclasses.fields(values)]
    assert names == list(expected), "the reference has other steps than this notebook"
    errors = {}
    for name, want in expected.items():
        got = np.asarray(getattr(values, name)).astype(np.float64)
        assert got.shape == want.shape, f"{name}: {got.shape} is not {want.shape}"
        visible = ~np.isneginf(want)
        assert np.array_equal(visible, ~np.isneginf(got)), f"{name}: other keys are masked"
        deviation = np.abs(got[visible] - want[visible]) / np.abs(want[visible]).max()
        errors[name] = (np.quantile(deviation, 0.9), deviation.max())
    return errors


def first_wrong_step(errors, limits):
    """The first intermediate beyond either limit (or not a number), or None."""
    for name, (quantile, largest) in errors.items():
        if not (quantile <= limits[0] and largest <= limits[1]):
            return name
    return None


reference = jax.jit(ref_kernel, static_argnames="rope_table")
all_errors = {}
for dtype, rope_table in itertools.product(DTYPES, DTYPES):
    inputs = MLAInput.random(**SHAPES, seq_len=NEW_TOKENS, prefill=PREFILL, seed=SEED, dtype=dtype)
    values = reference(inputs, rope_table=rope_table)
    errors = step_errors(values, numpy_intermediates(inputs, rope_table))
    all_errors[dtype, rope_table] = errors

print(f"{'0.9 quantile | maximum':24}" + "".join(f"{d + ', ' + t:>22}" for d, t in all_errors))
for name in errors:
    cells = (f"{errors[name][0]:.1e} | {errors[name][1]:.1e}" for errors in all_errors.values())
    print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))

for case, errors in all_errors.items():
    wrong = first_wrong_step(errors, LIMITS[case])
    assert wrong is None, f"{case}: {wrong} deviates by {errors[wrong]}, limits {LIMITS[case]}"

# %% [markdown]
# ## The comparison can fail
#
# A check is worth what it notices. Each of these mistakes is a small one that a kernel author
# could make; the comparison has to name the step where it first shows.

# %%
inputs = MLAInput.random(**SHAPES, seq_len=NEW_TOKENS, prefill=PREFILL, seed=SEED, dtype="bfloat16")
expected = numpy_intermediates(inputs, "float32")
mistakes = {
    "the table in bfloat16": (inputs, "bfloat16", "q_rope_final_ref"),
    "key and value rows swapped": (
        dataclasses.replace(inputs, KV_proj_up_weight=inputs.KV_proj_up_weight[::-1]),
        "float32",
        "kup_nope_ref",
    ),
    "queries half as large": (
        dataclasses.replace(inputs, Q_proj_down_weight=inputs.Q_proj_down_weight * 0.5),
        "float32",
        "q_lora_ref",
    ),
    "one output column lost": (
        dataclasses.replace(inputs, wo_weight=inputs.wo_weight.at[:, 0].set(0)),
        "float32",
        "output_ref",
    ),
}
for mistake, (wrong_inputs, rope_table, where) in mistakes.items():
    errors = step_errors(reference(wrong_inputs, rope_table=rope_table), expected)
    found = first_wrong_step(errors, LIMITS["bfloat16", "float32"])
    print(f"{mistake}: first seen in {found}")
    assert found == where

# %% [markdown]
# ## What the rotary table does
#
# The same float32 inputs under either table. In bfloat16 a position beyond 256 is no longer exact,
# so that the rotated keys, and all that follows, are those of other positions: with a relative
# distance that is off by one or more, attention looks elsewhere.

# %%
inputs = MLAInput.random(**SHAPES, seq_len=NEW_TOKENS, prefill=PREFILL, seed=SEED, dtype="float32")
exact, coarse = (reference(inputs, rope_table=table) for table in ("float32", "bfloat16"))
effect = {}
for name in ("theta_ref", "k_rope_final_ref", "attn_rope_ref", "attention_ref", "output_ref"):
    one, other = (np.asarray(getattr(values, name), np.float64) for values in (exact, coarse))
    effect[name] = np.abs(one - other).max() / np.abs(one).max()
    print(f"{name:20} moves by {effect[name]:.1e} of its largest value")
early = np.abs(np.asarray(exact.k_rope_final_ref - coarse.k_rope_final_ref))
print(f"rotated keys: {early[:, :8].max():.2f} in the first 8 positions, {early.max():.2f} in all")
assert effect["theta_ref"] < 2**-8
assert effect["k_rope_final_ref"] > 0.1
assert early[:, :8].max() < 0.05

# %% [markdown]
# ## The fast path
#
# Steps 3 and the first product of step 4 are what a paged kernel computes in one launch. It gets
# the queries and keys of the NumPy walk, the latter in pages of 64 in random order, and its result
# is held against `o_step4_0`, on each backend. A kernel keeps scores and sums in float32 where the
# steps round, so in bfloat16 they part by some units in the last place. Tensor cores take no
# float32: Mosaic GPU has no such row.

# %%
PAGE = 64
keys = PREFILL + NEW_TOKENS
pages_a_row = -(-keys // PAGE)
page_ids = np.random.default_rng(SEED).permutation(2 * pages_a_row).astype(np.int32)
indptr = jnp.array([0, pages_a_row, 2 * pages_a_row], jnp.int32)
last = jnp.full(2, (keys - 1) % PAGE + 1, jnp.int32)


def paged(rows, dtype):
    """[batch, keys, width] in the pages that `page_ids` lists, NaN where no key lies."""
    pool = np.full((len(page_ids), PAGE, rows.shape[-1]), np.nan)
    padded = np.pad(rows, [(0, 0), (0, -keys % PAGE), (0, 0)], constant_values=np.nan)
    pool[page_ids] = padded.reshape(-1, PAGE, rows.shape[-1])
    return jnp.asarray(pool, dtype)


fast_limits = {"float32": (2e-6, 2e-5), "bfloat16": (2**-8, 2**-6)}
ran = set()
for dtype, backend in itertools.product(DTYPES, KNOWN):
    inputs = MLAInput.random(**SHAPES, seq_len=NEW_TOKENS, prefill=PREFILL, seed=SEED, dtype=dtype)
    value = numpy_intermediates(inputs, "float32")
    queries = (value["q_absorb_permuted_ref"], value["q_rope_final_ref"])
    try:
        out, _ = mla_paged_decode(
            *(jnp.asarray(q.swapaxes(1, 2), dtype) for q in queries),
            *(paged(value[name], dtype) for name in ("kv_lora_ref", "k_rope_final_ref")),
            *(indptr, jnp.asarray(page_ids)),
            kv_last_page_len=last,
            backend=backend,
            interpret=backend != "reference",
        )
    except NotImplementedError as reason:
        print(f"{dtype:9} {reason}")
        continue
    want = value["o_step4_0_ref"].swapaxes(1, 2)
    deviation = np.abs(np.asarray(out, np.float64) - want) / np.abs(want).max()
    quantile, largest = np.quantile(deviation, 0.9), deviation.max()
    print(f"{dtype:9} {backend:11} {quantile:.1e} | {largest:.1e}")
    limits = fast_limits[dtype]
    assert quantile <= limits[0], (dtype, backend)
    assert largest <= limits[1], (dtype, backend)
    ran.add((dtype, backend))
assert ran >= set(itertools.product(DTYPES, ("reference", "triton")))
assert (("bfloat16", "mosaic_gpu") in ran) == (jax.__version_info__ >= (0, 11))

# %% [markdown]
# ## Error by step

# %%
_, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
names = list(expected)
for (dtype, rope_table), errors in all_errors.items():
    largest = [max(errors[name][1], 1e-9) for name in names]
    axes.semilogy(names, largest, marker="o", label=f"{dtype}, {rope_table} table")
axes.axhline(2**-8, color="grey", linewidth=0.8)
axes.annotate("one bfloat16 unit", (0, 2**-8), xytext=(0, 3), textcoords="offset points")
axes.set_ylim(top=0.1)
axes.set_ylabel("largest deviation / largest magnitude")
axes.set_title("ref_kernel against NumPy (exact values drawn at 1e-9)")
axes.tick_params(axis="x", labelrotation=75)
axes.legend()
plt.show()
