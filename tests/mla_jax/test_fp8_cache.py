"""A decoder over a latent cache in float8_e4m3fn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx

from mla_jax import (
    Decoder,
    PagedLatentCache,
    decode_step,
    dequantize_cache,
    generate,
    logit_shift,
    prefill,
    presets,
    quantize_cache,
)
from mla_jax.cli.main import main
from mla_jax.quantization import QuantizedPool

# Without experts: a rounding that tips the choice of one moves the logits by their whole spread.
CONFIG = dataclasses.replace(presets["tiny"], n_layers=2, moe=None, eos_ids=())
FP8 = jnp.float8_e4m3fn


@pytest.fixture(scope="module")
def model() -> Decoder:
    return drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)), 7)


def make_cache(dtype=None, rows=((5, 2, 7), (0, 3, -1))) -> PagedLatentCache:
    cache = PagedLatentCache.create(
        CONFIG, num_pages=8, page_size=16, max_batch=2, max_pages=3, dtype=dtype
    )
    return cache.with_rows(jnp.asarray(rows, jnp.int32), cache.lengths)


def test_pools(model):
    cache = make_cache(FP8)
    for pool in cache.ckv:
        assert isinstance(pool, QuantizedPool)
        latent = CONFIG.mla.kv_lora_rank
        assert pool.shape == (8, 16, latent)
        assert pool.values.dtype == FP8
        assert pool.scales.shape == (8, 16, -(-latent // 128))
    assert cache.kpe[0].dtype == CONFIG.dtype
    assert (cache.num_pages, cache.page_size, cache.max_length) == (8, 16, 48)


@pytest.mark.parametrize("options", [{}, {"backend": "triton", "interpret": True}])
def test_steps_read_what_was_quantised(model, rng, options):
    """The first layer's pool holds the plain cache's latents within e4m3's rounding, to the bit
    those of `quantize_cache`; a step over a plain cache of these numbers says the same."""
    tokens = jnp.asarray(rng.integers(0, 256, (2, 20)), jnp.int32)
    counts = jnp.asarray([20, 13], jnp.int32)
    run = jax.jit(lambda m, t, c: prefill(m, t, c, counts=counts, backend="reference"))
    step = jax.jit(lambda m, t, c: decode_step(m, t, c, **options))
    _, plain = run(model, tokens, make_cache())
    _, fp8 = run(model, tokens, make_cache(FP8))
    want = quantize_cache(plain.ckv[0], plain.kpe[0])
    written = np.asarray(fp8.ckv[0].scales) != 0
    assert written.sum() == 33
    np.testing.assert_array_equal(
        np.asarray(fp8.ckv[0].scales)[written], np.asarray(want.scales)[written]
    )
    slots = written[..., 0]
    got_values, want_values = (
        np.asarray(x)[slots].view(np.uint8) for x in (fp8.ckv[0].values, want.ckv)
    )
    np.testing.assert_array_equal(got_values, want_values)

    newest = tokens[:, 0]
    logits, after = step(model, newest, fp8)
    exact = []
    for quantized, kpe in zip(after.ckv, after.kpe, strict=True):
        parts = type(want)(ckv=quantized.values, scales=quantized.scales, kpe=kpe)
        exact.append(dequantize_cache(parts, jnp.float32)[0])
    # The new token is in these pools already: a plain step writes it again, unrounded, so the
    # oracle is the same layer over numbers that the cache stands for, and its own new latent.
    same = dataclasses.replace(plain, ckv=tuple(exact), kpe=after.kpe, lengths=fp8.lengths)
    oracle, _ = step(model, newest, same)
    moved, _ = step(model, newest, plain)
    np.testing.assert_array_equal(after.lengths, [21, 14])
    error = np.abs(np.asarray(logits - oracle)).max()
    shift = np.abs(np.asarray(logits - moved)).max()
    assert 0 < error < shift < 0.5 * np.asarray(moved).std()


def test_in_place_when_donated(model):
    cache = make_cache(FP8)
    tokens = jnp.ones((2, 3), jnp.int32)
    text = jax.jit(prefill, donate_argnums=2).lower(model, tokens, cache).as_text()
    arrays = len(jax.tree.leaves(cache))
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") >= arrays - 1


def test_expanded_prefill_reads_what_was_quantised(rng):
    """A chunk attends with full keys over cached latents, of two groups of columns."""
    mla = dataclasses.replace(CONFIG.mla, kv_lora_rank=256)
    config = dataclasses.replace(CONFIG, n_layers=1, mla=mla)
    model = drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)), 8)
    width = next(n for n in range(1, 1000) if model.layers[0].attn.expands(n))
    tokens = jnp.asarray(rng.integers(0, 256, (1, 2 * width)), jnp.int32)
    pages = -(-2 * width // 16)
    run = jax.jit(prefill, donate_argnums=2)
    logits = []
    for dtype in (None, FP8):
        cache = PagedLatentCache.create(
            config, num_pages=pages, page_size=16, max_batch=1, max_pages=pages, dtype=dtype
        )
        cache = cache.with_rows(jnp.arange(pages, dtype=jnp.int32)[None], cache.lengths)
        _, cache = run(model, tokens[:, :width], cache)
        logits.append(np.asarray(run(model, tokens[:, width:], cache)[0]))
    moved = np.abs(logits[1] - logits[0]).max() / logits[0].std()
    assert 0 < moved < 0.3


def test_copied_pages_keep_their_scales(model, rng):
    tokens = jnp.asarray(rng.integers(0, 256, (2, 20)), jnp.int32)
    _, cache = prefill(model, tokens, make_cache(FP8))
    copied = cache.copy_pages(jnp.asarray([5, 2]), jnp.asarray([6, -1]))
    for before, after in zip(cache.ckv, copied.ckv, strict=True):
        for old, new in zip(before, after, strict=True):
            old, new = (np.asarray(x).view(np.uint8) for x in (old, new))
            np.testing.assert_array_equal(new[6], old[5])
            np.testing.assert_array_equal(np.delete(new, 6, 0), np.delete(old, 6, 0))


def test_generate(model, rng):
    """Prompts of both prefill forms, and rows that do not see each other."""
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 40)]
    together = generate(model, prompts, max_new_tokens=6, kv_dtype="fp8")
    alone = [generate(model, [p], max_new_tokens=6, kv_dtype="fp8")[0] for p in prompts]
    assert together == alone
    with pytest.raises(ValueError, match="kv_dtype: got 'int4', expected None or 'fp8'"):
        generate(model, prompts, max_new_tokens=1, kv_dtype="int4")


def test_logit_shift(model, rng):
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 2, 70)]
    shift = logit_shift(model, prompts, page_size=16)
    assert 0 < shift["median"] < shift["p99"] < shift["max"] < shift["spread"]
    assert 0 <= shift["same_token"] <= 1
    # One token alone attends to its own latent only, which is rounded too.
    assert logit_shift(model, [[3]])["max"] > 0
    with pytest.raises(ValueError, match="prompts: got an empty one"):
        logit_shift(model, [[1], []])
    with pytest.raises(ValueError, match="kv_dtype: got 'int4', expected 'fp8'"):
        logit_shift(model, [[1]], kv_dtype="int4")


def test_cli(capsys):
    argv = [
        "generate",
        "--kv-dtype",
        "fp8",
        "--prompt",
        "A list",
        "--max-new-tokens",
        "1",
        "--json",
    ]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)["logit_shift"]) == {"median", "p99", "max", "spread", "same_token"}
    assert "logits with the fp8 cache: moved by" in err
