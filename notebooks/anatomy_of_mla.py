# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # The anatomy of Multi-head Latent Attention
#
# Ordinary attention caches a key and a value for every head of every token. MLA (DeepSeek-V2,
# arXiv:2405.04434) caches one *latent* vector a token, from which every head's key and value could
# be rebuilt, and one short rotated key that all heads share. This notebook walks through a layer
# with DeepSeek-V2-Lite's sizes, computes it a second time in NumPy and float64, and counts what the
# latent saves.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from mla_jax import MLA, PagedLatentCache, presets
from mla_jax.bench import report
from mla_jax.bench.paged import PagedShape
from mla_jax.cache import AbsorbCache, NaiveCache
from mla_jax.reference import LayerWeights, precompute_freqs_cis, ref_layer

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
print("seed", SEED)
# Without YaRN, which changes only the frequencies and the scale.
config = dataclasses.replace(presets["deepseek-v2-lite"].mla, yarn=None, dtype="float32")
layer = MLA(config, rngs=nnx.Rngs(SEED))
BATCH, TOKENS = 2, 4
x = jax.random.normal(jax.random.key(SEED), (BATCH, TOKENS, config.dim))

# %% [markdown]
# ## A walk through the layer
#
# The hidden state goes two ways. `wq` makes a query for each of 16 heads, 128 numbers without and
# 64 with a position. `wkv_a` makes the latent, 512 numbers that are normalised and cached, and the
# shared key of 64 numbers, which is rotated by its position and cached beside it.
#
# *Naive*, `wkv_b` then expands each latent to 16 keys and 16 values. *Absorbed*, it is applied to
# the query instead, and after the sum: $q\cdot(W_k c) = (W_k^\top q)\cdot c$, and
# $\sum_t p_t W_v c_t = W_v \sum_t p_t c_t$. Attention then runs on the latents themselves.

# %%
weights = LayerWeights(
    wq=layer.wq.weight[...],
    wkv_a=layer.wkv_a.weight[...],
    kv_norm=layer.kv_norm.weight[...],
    wkv_b=layer.wkv_b.weight[...],
    wo=layer.wo.weight[...],
)
walk = jax.jit(ref_layer, static_argnames=("n_heads", "attn_impl"))
options = {"freqs_cis": precompute_freqs_cis(TOKENS), "n_heads": config.n_heads}
traces = {impl: walk(x, weights, attn_impl=impl, **options) for impl in ("naive", "absorb")}
print(f"{'':18}{'naive':>20}{'absorb':>20}")
for field in dataclasses.fields(traces["naive"])[:-1]:
    values = [getattr(trace, field.name) for trace in traces.values()]
    cells = ["–" if value is None else str(list(value.shape)) for value in values]
    if cells != ["–", "–"]:
        print(f"{field.name:18}{cells[0]:>20}{cells[1]:>20}")

shapes = {name: getattr(value, "shape", None) for name, value in vars(traces["absorb"]).items()}
assert shapes["q"] == (2, 4, 3072)
assert shapes["kv"] == (2, 4, 576)
assert shapes["q_absorbed"] == (2, 4, 16, 512)
assert shapes["scores"] == (2, 4, 16, 4)

# %% [markdown]
# ## The same in NumPy
#
# Written from the paper, position by position; complex numbers do the rotation.


# %%
def numpy_layer(x, weights, config):
    """out [batch, tokens, dim] in float64, expanded keys and values of every head."""
    nope, rope, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.n_heads
    x, wq, wkv_a, norm, wkv_b, wo = (
        np.asarray(a, np.float64)
        for a in (x, weights.wq, weights.wkv_a, weights.kv_norm, weights.wkv_b, weights.wo)
    )
    batch, tokens, _ = x.shape
    angles = np.outer(np.arange(tokens), 10000.0 ** (-np.arange(rope // 2) / (rope // 2)))

    def rotate(pairs):
        turned = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(pairs.shape)

    q = (x @ wq.T).reshape(batch, tokens, heads, nope + rope)
    latent, k_pe = np.split(x @ wkv_a.T, [wkv_a.shape[0] - rope], axis=-1)
    latent /= np.sqrt((latent**2).mean(axis=-1, keepdims=True) + 1e-6)
    expanded = (latent * norm @ wkv_b.T).reshape(batch, tokens, heads, -1)
    k_nope, v = expanded[..., :nope], expanded[..., nope:]
    q_pe, k_pe = rotate(q[..., nope:]), rotate(k_pe[:, :, None])
    out = np.empty((batch, tokens, heads * v.shape[-1]))
    for b in range(batch):
        for t in range(tokens):
            scores = np.einsum("hd,khd->hk", q[b, t, :, :nope], k_nope[b, : t + 1])
            scores += np.einsum("hd,kd->hk", q_pe[b, t], k_pe[b, : t + 1, 0])
            powers = np.exp(scores / np.sqrt(nope + rope))
            powers /= powers.sum(axis=-1, keepdims=True)
            out[b, t] = np.einsum("hk,khv->hv", powers, v[b, : t + 1]).ravel()
    return out @ wo.T


exact = numpy_layer(x, weights, config)
got = {f"ref_layer, {impl}": trace.out for impl, trace in traces.items()}
got |= {f"MLA, {impl}": jax.jit(layer, static_argnames="attn_impl")(x, attn_impl=impl)
        for impl in traces}  # fmt: skip
# Token by token through the absorbed cache, as decoding does it.
cache = AbsorbCache.create(config, batch=BATCH, max_seq_len=TOKENS)
steps = []
for t in range(TOKENS):
    step, cache = layer(x[:, t : t + 1], cache, t)
    steps.append(step)
got["MLA, step by step"] = jnp.concatenate(steps, axis=1)
for name, out in got.items():
    error = np.abs(np.asarray(out) - exact).max() / np.abs(exact).max()
    print(f"{name:20} deviates by {error:.1e} of the largest value")
    assert error < 1e-5, name

# %% [markdown]
# ## What the latent saves: memory
#
# Bytes of a cached token in a layer, bfloat16. Grouped-query attention with 8 key heads of 128 is
# what comparable models without MLA use. The bars of MLA and of full keys are those of the caches
# that the library allocates, and equal the sums by hand.

# %%
# V3.2 is V3 with an indexer, whose keys are no part of the comparison.
models = [name for name in presets if name.startswith("deepseek") and name != "deepseek-v3.2"]
one_of_each = {"num_pages": 1, "page_size": 1, "max_batch": 1, "max_pages": 1}
per_token = {"every head (MHA)": [], "8 groups (GQA)": [], "latent (MLA)": []}
for name in models:
    model = dataclasses.replace(presets[name], n_layers=1, n_dense=0)
    mla = model.mla
    full = jax.eval_shape(lambda mla=mla: NaiveCache.create(mla, batch=1, max_seq_len=1))
    latent = jax.eval_shape(lambda model=model: PagedLatentCache.create(model, **one_of_each))
    full_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(full))
    latent_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in (*latent.ckv, *latent.kpe))
    assert full_bytes == 2 * mla.n_heads * (128 + 64 + 128)
    assert latent_bytes == 2 * (512 + 64)
    for column, value in zip(
        per_token.values(), (full_bytes, 2 * 2 * 8 * 128, latent_bytes), strict=True
    ):
        column.append(value)

_, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for i, (kind, values) in enumerate(per_token.items()):
    bars = axes.bar(np.arange(len(models)) + 0.27 * (i - 1), values, 0.25, label=kind)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
axes.set_xticks(range(len(models)), models)
axes.set_yscale("log")
axes.set_ylabel("bytes a token and layer")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What absorption costs: arithmetic
#
# Multiplications for one more query against a cache of `m` tokens. Naively each cached latent is
# expanded first; absorbed, products are wider (576 + 512 numbers a head instead of 192 + 128) but
# nothing is expanded. One query: absorbing wins by far. Many queries share the expansion, which is
# why prefill expands. `MLA.expands` has the same break-even.

# %%
full_width, latent_width = 128 + 64 + 128, 512 + 64 + 512
expansion = 512 * (128 + 128)
queries = np.arange(1, 601)
naive = expansion / queries + full_width
absorbed = np.full(len(queries), float(latent_width))
turn = int(queries[naive < absorbed][0])
_, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.loglog(queries, naive, label="naive: expand, then narrow products")
axes.loglog(queries, absorbed, label="absorbed: wide products")
axes.axvline(turn, color="grey", linewidth=0.8, linestyle=":")
axes.set(xlabel="queries that share the cache", ylabel="multiplications a key, head and query")
axes.legend(frameon=False)
print(f"expanding is less arithmetic from {turn} queries on")
assert not layer.expands(turn - 1)
assert layer.expands(turn)
plt.show()

# %% [markdown]
# ## Why decoding waits for memory, and where it turns
#
# All heads read the same latent, so a step's arithmetic for each byte grows with heads and query
# tokens. Below the ridge, which is the GPU's matrix rate over its bandwidth as both were measured,
# a step cannot be faster than reading the cache once; above it, than its products.

# %%
ceilings = report.read("paged_decode_h200")["ceilings"]
ridge = ceilings["matmul_tflop_s"] * 1e12 / (ceilings["bandwidth_gb_s"] * 1e9)
_, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
grid = np.geomspace(4, 4000, 100)
axes.loglog(grid, np.minimum(grid / ridge, 1), color="grey")
for rows in (8, 16, 32, 64, 128, 256, 512):
    heads, tokens = min(rows, 128), max(rows // 128, 1)
    shape = PagedShape(name="", lengths=(4096,) * 128, heads=heads, tokens=tokens)
    keys = 128 * 4096
    moved = 2 * (keys * 576 + 128 * rows * (576 + 512))  # the cache once; queries and outputs
    flops = 2 * keys * rows * (576 + 512)
    assert (shape.moved, shape.flops) == (moved, flops)
    intensity = flops / moved
    # For many keys: 2 * 1088 operations a row for 1,152 bytes.
    assert abs(intensity / (rows * 2 * 1088 / 1152) - 1) < 0.25
    axes.plot(intensity, min(intensity / ridge, 1), "o")
    axes.annotate(f"{heads} × {tokens}", (intensity, min(intensity / ridge, 1) * 0.7))
turning = int(np.ceil(ridge * 1152 / (2 * 1088)))
axes.set(xlabel="operations a byte", ylabel="of the matrix rate, at most")
axes.set_title(f"heads × query tokens, 4,096 keys; the ridge is at {ridge:.0f}", fontsize=9)
print(f"memory is the limit below {turning} rows (heads × query tokens)")
assert 16 < turning < 128
plt.show()
