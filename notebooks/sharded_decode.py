# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # Decoding on a mesh of devices
#
# Weights lie split over the axis `model`: heads, experts, vocabulary. Requests lie over `data`, and
# the pages of a long context over `context`. Here eight devices are simulated on the CPU; the
# programs are those that eight GPUs would run. The shipped model decodes on several meshes, every
# logit is compared with a NumPy model in float64, and the messages in the compiled programs are
# counted.

# %%
import os

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import collections
import re
from importlib.resources import files

import jax
import matplotlib.pyplot as plt
import numpy as np

import mla_jax
from mla_jax.sharding import make_mesh, shard_model
from mla_jax.sharding.plan import plan_decode

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
rng = np.random.default_rng(SEED)
print("seed", SEED, "on", len(jax.devices()), "devices")
assert len(jax.devices()) == 8
model = mla_jax.load_checkpoint(files("mla_jax") / "models" / "tiny", dtype="float32")
config, mla = model.config, model.config.mla

# %% [markdown]
# ## The model in NumPy
#
# Whole sequences, no cache, no devices: attention with full keys and values, experts one by one.


# %%
def f64(parameter):
    return np.asarray(parameter[...], np.float64)


def norm(x, module):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * f64(module.weight)


def rotate(x):
    """x [tokens, ..., rope]: pairs (2i, 2i + 1), turned by their position's angle."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(len(x)), mla.rope_theta ** (-np.arange(half) / half))
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles).reshape(
        len(x), *[1] * (x.ndim - 2), half
    )
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def attention(x, attn):
    q = norm(x @ f64(attn.wq_a.weight).T, attn.q_norm) @ f64(attn.wq_b.weight).T
    q = q.reshape(len(x), mla.n_heads, -1)
    kv = x @ f64(attn.wkv_a.weight).T
    latent, shared = norm(kv[:, : mla.kv_lora_rank], attn.kv_norm), kv[:, mla.kv_lora_rank :]
    expanded = (latent @ f64(attn.wkv_b.weight).T).reshape(len(x), mla.n_heads, -1)
    k, v = np.split(expanded, [mla.qk_nope_head_dim], axis=-1)
    scores = np.einsum("qhd,khd->hqk", q[..., : mla.qk_nope_head_dim], k)
    scores += np.einsum("qhd,kd->hqk", rotate(q[..., mla.qk_nope_head_dim :]), rotate(shared))
    scores = np.where(np.tri(len(x), dtype=bool), scores / np.sqrt(mla.qk_head_dim), -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = np.einsum("hqk,khv->qhv", powers / powers.sum(axis=-1, keepdims=True), v)
    return out.reshape(len(x), -1) @ f64(attn.wo.weight).T


def gated(x, gate_up, down):
    gate, up = x @ gate_up[0].T, x @ gate_up[1].T
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def experts(x, moe):
    out = gated(x, f64(moe.shared.gate_up), f64(moe.shared.down.weight))
    scores = 1 / (1 + np.exp(-(x @ f64(moe.router.weight).T)))
    for token, row in enumerate(scores):
        chosen = np.argsort(-(row + f64(moe.router.bias)))[: config.moe.n_active]
        for expert in chosen:
            weight = row[expert] / row[chosen].sum() * config.moe.route_scale
            mine = f64(moe.gate_up)[expert], f64(moe.down)[expert]
            out[token] += weight * gated(x[token : token + 1], *mine)[0]
    return out


def numpy_logits(tokens):
    x = f64(model.embed)[tokens]
    for layer in model.layers:
        x = x + attention(norm(x, layer.attn_norm), layer.attn)
        hidden = norm(x, layer.ffn_norm)
        if hasattr(layer.ffn, "router"):
            x = x + experts(hidden, layer.ffn)
        else:
            x = x + gated(hidden, f64(layer.ffn.gate_up), f64(layer.ffn.down.weight))
    return norm(x, model.norm) @ f64(model.embed if model.head is None else model.head).T


# %% [markdown]
# ## Where things lie
#
# On a mesh of 2 × 2 × 2. A box is a device's part of an array's first two axes.


# %%
def draw(arrays):
    _, panels = plt.subplots(1, len(arrays), figsize=(9, 2.6), layout="constrained")
    for axes, (name, array) in zip(panels, arrays.items(), strict=True):
        held = collections.defaultdict(list)
        for shard in array.addressable_shards:
            bounds = [
                part.indices(size) for part, size in zip(shard.index, array.shape, strict=True)
            ]
            held[tuple((start, stop) for start, stop, _ in bounds[:2])].append(shard.device.id)
        for number, ((rows, columns), ids) in enumerate(sorted(held.items())):
            corner, size = (columns[0], rows[0]), (columns[1] - columns[0], rows[1] - rows[0])
            axes.add_patch(plt.Rectangle(corner, *size, color=plt.cm.Pastel1(number % 9)))
            middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
            axes.text(
                *middle, " ".join(map(str, sorted(ids))), ha="center", va="center", fontsize=7
            )
        axes.set(xlim=(0, array.shape[1]), ylim=(array.shape[0], 0))
        axes.set_title(f"{name} {list(array.shape)}", fontsize=8)
    plt.show()


BATCH, PAGE, MAX_PAGES, NUM_PAGES = 4, 8, 8, 32


def cache_on(mesh):
    """An empty cache, each group of requests with its pages in random order."""
    groups = 1 if mesh is None else mesh.shape["data"]
    sizes = {"num_pages": NUM_PAGES, "page_size": PAGE, "max_batch": BATCH, "max_pages": MAX_PAGES}
    cache = mla_jax.PagedLatentCache.create(config, **sizes, mesh=mesh)
    table = [rng.permutation(NUM_PAGES // groups).reshape(-1, MAX_PAGES) for _ in range(groups)]
    place = None if mesh is None else cache.block_table.sharding
    table = jax.device_put(np.concatenate(table).astype(np.int32), place)
    return cache.with_rows(table, cache.lengths)


mesh = make_mesh(data=2, model=2, context=2)
sharded, cache = shard_model(model, mesh), cache_on(mesh)
moe = sharded.layers[1]
draw(
    {
        "wq_b": moe.attn.wq_b.weight[...],
        "wo": moe.attn.wo.weight[...],
        "experts": moe.ffn.gate_up[...],
        "ckv pool": cache.ckv[0],
        "table": cache.block_table,
    }
)
pool_part = cache.ckv[0].addressable_shards[0].data
assert pool_part.shape[0] == NUM_PAGES // 4
assert moe.attn.wq_b.weight[...].addressable_shards[0].data.shape[0] == mla.n_heads * 48 // 2

# %% [markdown]
# ## The same logits on every mesh
#
# Ragged prompts, then five steps. `jax.set_mesh` around the same two functions is all that changes.

# %%
counts = np.array([1, 9, PAGE, 23], np.int32)
STEPS = 3
tokens = rng.integers(1, config.vocab, (BATCH, 23 + STEPS)).astype(np.int32)
wanted = [numpy_logits(row) for row in tokens]
kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
found = {}


def fill_rows(model, tokens, cache, counts):
    return mla_jax.prefill(model, tokens, cache, counts=counts)


def decode_on(mesh):
    """The largest deviation of any logit, and the compiled step."""
    weights, cache = shard_model(model, mesh), cache_on(mesh)
    place, lengths, worst = cache.lengths.sharding, counts.copy(), 0.0
    with jax.set_mesh(mesh):
        args = weights, jax.device_put(tokens[:, :23], place), cache, jax.device_put(counts, place)
        logits, cache = jax.jit(fill_rows, donate_argnums=2)(*args)
        step = None
        for number in range(STEPS + 1):
            for got, want, length in zip(np.asarray(logits), wanted, lengths, strict=True):
                worst = max(worst, np.abs(got - want[length - 1]).max())
            if number == STEPS:
                return worst, step
            newest = jax.device_put(tokens[np.arange(BATCH), lengths], place)
            if step is None:
                step = jax.jit(mla_jax.decode_step, donate_argnums=2)
                step = step.lower(weights, newest, cache).compile()
            logits, cache = step(weights, newest, cache)
            lengths += 1


for shape in ({"model": 4}, {"data": 2, "context": 4}, {"data": 2, "model": 2, "context": 2}):
    worst, step = decode_on(make_mesh(**shape))
    found[str(shape)] = messages = collections.Counter(re.findall(kinds, step.as_text()))
    print(f"{shape!s:42} logits within {worst:.1e}; messages a step: {dict(messages)}")
    assert worst < 2e-4, shape
    # What the plan says: two sums a layer over `model`, one merge a layer over `context`.
    plan = plan_decode(config, batch=BATCH, tokens=MAX_PAGES * PAGE, page_size=PAGE, **shape)
    assert messages == {message.kind: message.count for message in plan.messages}, shape
    expected = {}
    if shape.get("model", 1) > 1:
        expected["all-reduce"] = 2 * config.n_layers
    if shape.get("context", 1) > 1:
        expected["all-gather"] = config.n_layers
    assert messages == expected, shape

# %%
_, axes = plt.subplots(figsize=(6, 2.4), layout="constrained")
for i, kind in enumerate(("all-reduce", "all-gather")):
    numbers = [messages[kind] for messages in found.values()]
    axes.barh(np.arange(len(found)) + 0.4 * i, numbers, 0.38, label=kind)
axes.set_yticks(np.arange(len(found)) + 0.2, list(found), fontsize=8)
axes.set(xlabel=f"messages a decode step, {config.n_layers} layers")
axes.legend(frameon=False)
plt.show()
