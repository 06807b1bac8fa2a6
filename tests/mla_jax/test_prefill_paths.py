"""`MLA.paged` with many tokens: in the latent space or with full keys, the layer is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from oracles import QUICK_COMPILE

from mla_jax import MLA, MLAConfig, ModelConfig, PagedLatentCache
from mla_jax.config import presets
from mla_jax.nn import mla as module
from mla_jax.rope import rotation

CONFIG = MLAConfig(
    dim=24,
    n_heads=3,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    dtype="float32",
)
BATCH, PAGE, MAX_PAGES = 3, 4, 24
MODEL = ModelConfig(vocab=8, n_layers=1, inter_dim=8, max_seq_len=MAX_PAGES * PAGE, mla=CONFIG)
# Tokens that each row brings, a chunk at a time: more than it holds, none, one.
CHUNKS = ((40, 7, 0), (1, 0, 40), (40, 40, 1))
WIDTH = 40


def whole(layer: MLA, x: jax.Array) -> np.ndarray:
    return np.asarray(layer(x, attn_impl="naive"))


def in_chunks(layer: MLA, x: jax.Array, rng: np.random.Generator, **kernel) -> list[np.ndarray]:
    """Each row's outputs, its tokens written and attended to as CHUNKS say."""
    order = rng.permutation(BATCH * MAX_PAGES).astype(np.int32).reshape(BATCH, MAX_PAGES)
    cache = PagedLatentCache.create(
        MODEL, num_pages=order.size, page_size=PAGE, max_batch=BATCH, max_pages=MAX_PAGES
    )
    # What no row has written may hold anything.
    cache = dataclasses.replace(
        cache,
        ckv=tuple(jnp.full_like(pool, jnp.nan) for pool in cache.ckv),
        kpe=tuple(jnp.full_like(pool, jnp.nan) for pool in cache.kpe),
    )
    cache = cache.with_rows(jnp.asarray(order), jnp.zeros(BATCH, jnp.int32))
    graph, state = nnx.split(layer)

    def call(state, x, cache, counts):
        layer = nnx.merge(graph, state)
        view = cache.view(WIDTH, counts)
        rope = rotation(CONFIG, view.positions)
        out, ckv, kpe = layer.paged(x, cache.ckv[0], cache.kpe[0], view, rope, **kernel)
        return out, cache.advanced(view, (ckv,), (kpe,))

    compiled = jax.jit(call, compiler_options=QUICK_COMPILE)
    done = np.zeros(BATCH, int)
    outs: list[list[np.ndarray]] = [[] for _ in range(BATCH)]
    for counts in CHUNKS:
        chunk = np.zeros((BATCH, WIDTH, CONFIG.dim), np.float32)
        for row, count in enumerate(counts):
            chunk[row, :count] = x[row, done[row] : done[row] + count]
        out, cache = compiled(state, jnp.asarray(chunk), cache, jnp.asarray(counts, jnp.int32))
        for row, count in enumerate(counts):
            outs[row].append(np.asarray(out)[row, :count])
        done += counts
    return [np.concatenate(rows) for rows in outs]


@pytest.mark.parametrize("context", [12, 10**6])
@pytest.mark.parametrize("expanded", [True, False])
def test_chunks_make_the_whole(seed, rng, monkeypatch, expanded, context):
    """Whatever form, however many blocks the cached tokens are expanded in."""
    monkeypatch.setattr(MLA, "expands", lambda self, tokens: expanded)
    monkeypatch.setattr(module, "CONTEXT_TOKENS", context)
    layer = drawn(lambda: MLA(CONFIG, rngs=nnx.Rngs(0)), seed)
    x = jnp.asarray(rng.standard_normal((BATCH, 81, CONFIG.dim)), jnp.float32)
    want = whole(layer, x)
    for row, got in enumerate(in_chunks(layer, x, rng)):
        np.testing.assert_allclose(got, want[row, : len(got)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expanded", [True, False])
def test_the_kernels_agree(seed, rng, monkeypatch, expanded):
    monkeypatch.setattr(MLA, "expands", lambda self, tokens: expanded)
    monkeypatch.setattr(module, "CONTEXT_TOKENS", 100)
    layer = drawn(lambda: MLA(CONFIG, rngs=nnx.Rngs(0)), seed)
    x = jnp.asarray(rng.standard_normal((BATCH, 81, CONFIG.dim)), jnp.float32)
    want = whole(layer, x)
    for row, got in enumerate(in_chunks(layer, x, rng, backend="triton", interpret=True)):
        np.testing.assert_allclose(got, want[row, : len(got)], rtol=1e-4, atol=1e-4)


def test_which_form_is_less_arithmetic():
    """512 * 256 multiplications a key, against 768 saved with each query."""
    config = presets["deepseek-v2-lite"].mla
    layer = nnx.eval_shape(lambda: MLA(config, rngs=nnx.Rngs(0)))
    assert not layer.expands(170)
    assert layer.expands(171)


def test_a_backend_without_the_widths_stays_in_the_latent_space(seed, rng, monkeypatch):
    """Heads of 8 + 16 are none of the kernel's, latents of 16 are."""
    monkeypatch.setattr(MLA, "expands", lambda self, tokens: True)
    config = dataclasses.replace(CONFIG, qk_nope_head_dim=8)
    layer = drawn(lambda: MLA(config, rngs=nnx.Rngs(0)), seed)
    x = jnp.asarray(rng.standard_normal((BATCH, 81, config.dim)), jnp.float32)
    want = whole(layer, x)
    for row, got in enumerate(in_chunks(layer, x, rng, backend="triton", interpret=True)):
        np.testing.assert_allclose(got, want[row, : len(got)], rtol=1e-4, atol=1e-4)
