# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # The layer and the model against `transformers`
#
# A small DeepSeek-V3 with random weights is built and saved by `transformers`, loaded with
# `load_checkpoint`, and compared: first its attention layer, whose inputs and outputs are caught on
# their way through the model, then its logits. Ours runs naive, absorbed and paged, the last on
# each backend. This page needs torch and transformers; without them it stops here.

# %%
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

import mla_jax
from mla_jax.cache import AbsorbCache, NaiveCache
from mla_jax.rope import rotation

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
rng = np.random.default_rng(SEED)
torch.manual_seed(SEED)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
print("seed", SEED, "torch", torch.__version__, "transformers", transformers.__version__)

# %% [markdown]
# Sizes that every kernel takes: powers of two, and multiples of 16 for the experts. YaRN is on, the
# scale's factor and the rotation's differ from 1.

# %%
config = transformers.DeepseekV3Config(
    vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    rope_parameters={
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 8.0,
        "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.3,
    },
)  # fmt: skip
theirs = transformers.DeepseekV3ForCausalLM(config).eval()
theirs.set_experts_implementation("eager")
with torch.no_grad():
    for name, parameter in theirs.named_parameters():
        scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
        value = rng.standard_normal(parameter.shape) * scale
        if parameter.ndim == 1:
            value = rng.uniform(0.5, 1.5, parameter.shape)
        parameter.copy_(torch.from_numpy(value.astype(np.float32)))
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = mla_jax.load_checkpoint(folder)
print("attention layers:", len(ours.layers), "parameters:", theirs.num_parameters())

# %% [markdown]
# ## What the reference computes
#
# In float64, so that all of what is left below is ours. Hooks catch what enters and leaves the
# attention of layer 0.

# %%
LENGTH = 40
tokens = rng.integers(0, 97, (2, LENGTH))
caught = {}


def catch(module, args, kwargs, output):
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    caught["in"], caught["out"] = hidden.numpy(), output[0].numpy()


theirs.model.layers[0].self_attn.register_forward_hook(catch, with_kwargs=True)
with torch.no_grad():
    want_logits = theirs.double()(torch.from_numpy(tokens)).logits.numpy()
assert caught["in"].shape == caught["out"].shape == (2, LENGTH, 64)

errors = {}


def compare(name, got, want, limit=1e-4):
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    errors[name] = error
    print(f"{name:28} {error:.1e} of the largest value")
    assert error < limit, name


# %% [markdown]
# ## The layer
#
# The second half of the tokens as a chunk on top of a cached first half, so that caches matter; the
# paged form writes them to pages in random order and reads these back.

# %%
layer = ours.layers[0].attn
x = jnp.asarray(caught["in"], jnp.float32)
want = caught["out"]
HALF, PAGE = LENGTH // 2, 8
compare("layer, naive", layer(x, attn_impl="naive"), want)
compare("layer, absorb", layer(x, attn_impl="absorb"), want)
for kind in (NaiveCache, AbsorbCache):
    cache = kind.create(layer.config, batch=2, max_seq_len=LENGTH)
    first, cache = layer(x[:, :HALF], cache)
    second, cache = layer(x[:, HALF:], cache, HALF)
    compare(f"layer, {kind.__name__}", jnp.concatenate([first, second], axis=1), want)

BACKENDS = {"reference": False, "triton": True}  # and whether it is interpreted here
max_pages = LENGTH // PAGE
table = jnp.asarray(rng.permutation(2 * max_pages).reshape(2, max_pages), jnp.int32)
sizes = {"num_pages": 2 * max_pages, "page_size": PAGE, "max_batch": 2, "max_pages": max_pages}


def empty():
    cache = mla_jax.PagedLatentCache.create(ours.config, **sizes)
    return cache.with_rows(table, cache.lengths)


for backend, interpret in BACKENDS.items():
    cache, parts = empty(), []
    for chunk in (x[:, :HALF], x[:, HALF:-1], x[:, -1:]):
        view = cache.view(chunk.shape[1], jnp.full(2, chunk.shape[1], jnp.int32))
        out, ckv, kpe = layer.paged(
            *(chunk, cache.ckv[0], cache.kpe[0], view, rotation(layer.config, view.positions)),
            backend=backend,
            interpret=interpret,
        )
        cache = cache.advanced(view, (ckv, *cache.ckv[1:]), (kpe, *cache.kpe[1:]))
        parts.append(out)
    compare(f"layer, paged, {backend}", jnp.concatenate(parts, axis=1), want)

# %% [markdown]
# ## The model
#
# Whole sequences without a cache; then prefill and single steps over pages, on each backend.

# %%
got = jax.jit(lambda model, tokens: model(tokens))(ours, jnp.asarray(tokens, jnp.int32))
compare("model, naive", got, want_logits)
assert (np.asarray(got).argmax(-1) == want_logits.argmax(-1)).mean() > 0.95

STEPS = 6
for backend, interpret in BACKENDS.items():
    options = {"backend": backend, "interpret": interpret}
    fill = jax.jit(lambda m, t, c, options=options: mla_jax.prefill(m, t, c, **options))
    step = jax.jit(lambda m, t, c, options=options: mla_jax.decode_step(m, t, c, **options))
    prompt = jnp.asarray(tokens[:, : LENGTH - STEPS], jnp.int32)
    logits, cache = fill(ours, prompt, empty())
    made = [logits]
    for i in range(LENGTH - STEPS, LENGTH):
        logits, cache = step(ours, jnp.asarray(tokens[:, i], jnp.int32), cache)
        made.append(logits)
    last = want_logits[:, LENGTH - STEPS - 1 :]
    compare(f"model, paged, {backend}", jnp.stack(made, axis=1), last)

# %%
_, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.barh(list(errors), list(errors.values()), color="#0072B2")
axes.set(xscale="log", xlabel="largest deviation from transformers in float64 / largest value")
axes.invert_yaxis()
assert len(errors) == 9
plt.show()

# %% [markdown]
# The comparison can fail: the same model with its rotary factor left out, with one norm off by a
# percent, and with two heads exchanged, is not the same model.

# %%
import dataclasses

mla = ours.config.mla
no_factor = dataclasses.replace(mla, yarn=dataclasses.replace(mla.yarn, attention_factor=1.0))


def deviation(change):
    changed = jax.tree.map(lambda leaf: leaf, layer)
    change(changed)
    out = np.asarray(changed(x, attn_impl="naive"), np.float64)
    return np.abs(out - want).max() / np.abs(want).max()


def louder(layer):
    layer.kv_norm.weight[...] = layer.kv_norm.weight[...] * 1.01


def exchanged(layer):
    weight = layer.wo.weight[...]
    layer.wo.weight[...] = jnp.concatenate(
        [weight[:, 16:32], weight[:, :16], weight[:, 32:]], axis=1
    )


def without_factor(layer):
    layer.config = no_factor


for change in (louder, exchanged, without_factor):
    error = deviation(change)
    print(f"{change.__name__:16} {error:.1e}")
    assert error > 1e-3, change.__name__
