"""The cache of a model with an indexer: what it holds, and what happens to it in a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from indexed import (
    BATCH,
    CONFIG,
    DENSE,
    MAX_PAGES,
    NUM_PAGES,
    PAGE,
    TOPK,
    dense_model,
    fill,
    jitted,
    make_cache,
    make_tokens,
    model,
    step,
    whole,
)
from meshed import mesh_of

from mla_jax import PageAllocator, PagedLatentCache, decode_step, megakernel, presets
from mla_jax.cache import AbsorbCache
from mla_jax.sharding import check_mesh

FP8 = jnp.float8_e4m3fn


def test_one_program_for_all_lengths(seed, rng):
    """From the first token to beyond index_topk, while tables move and rows pause."""
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return decode_step(*args)

    run, cache = jitted(counted), make_cache(rng)
    full = cache.block_table
    cache = cache.with_rows(full.at[1, 1:].set(-1), cache.lengths)
    for i in range(TOPK + 4):
        logits, cache = run(model(seed), make_tokens(rng, BATCH), cache)
        if i == 40:
            cache = cache.with_rows(full + 0, cache.lengths)
    np.testing.assert_array_equal(cache.lengths, [68, PAGE + 27, 68])
    assert np.isfinite(np.asarray(logits)).all()
    assert traces == 1


def test_in_place(seed, rng):
    """Every pool of a donated cache is written where it lies, the indexer's too."""
    cache = make_cache(rng)
    sizes = jax.tree.map(lambda x: x.nbytes, cache)
    assert len(jax.tree.leaves(cache.index_keys)) == 2 * CONFIG.n_layers
    args = model(seed), jnp.zeros(BATCH, jnp.int32), cache
    memory = step().lower(*args).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(jax.tree.leaves(sizes))
    step()(*args)
    assert all(pool.is_deleted() for pool in jax.tree.leaves(cache.index_keys))


def test_pools():
    cache = PagedLatentCache.create(CONFIG, num_pages=3, page_size=8, max_batch=1, max_pages=2)
    assert [pool.values.shape for pool in cache.index_keys] == [(3, 8, 32)] * 2
    assert {pool.values.dtype for pool in cache.index_keys} == {jnp.dtype(FP8)}
    assert {pool.scales.shape for pool in cache.index_keys} == {(3, 8, 1)}
    assert {pool.scales.dtype for pool in cache.index_keys} == {jnp.dtype("float32")}
    none = PagedLatentCache.create(DENSE, num_pages=3, page_size=8, max_batch=1, max_pages=2)
    assert none.index_keys == ()


def test_shared_prefix(seed, rng):
    """Copy-on-write: a copied page has its tokens' index keys, and its row goes its own way."""
    prompt, tails = make_tokens(rng, 1, TOPK + 2), make_tokens(rng, BATCH, 2)
    allocator = PageAllocator(NUM_PAGES, page_size=PAGE, max_pages=MAX_PAGES)
    root = allocator.allocate(TOPK + 2)
    cache = make_cache(rng)
    cache = cache.with_rows(jnp.asarray(allocator.table([root, None, None])), cache.lengths)
    counts = jnp.asarray([TOPK + 2, 0, 0], jnp.int32)
    sequences = jnp.concatenate([jnp.tile(prompt, (BATCH, 1)), tails], axis=1)
    _, cache = fill()(model(seed), sequences, cache, counts=counts)

    rows = [root, allocator.fork(root), allocator.fork(root)]
    copies = [pair for row in rows for pair in allocator.extend(row, 2)]
    assert len(copies) == 2
    before = [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(cache.index_keys)]
    cache = cache.copy_pages(*jnp.asarray(copies, jnp.int32).T)
    for old, leaf in zip(before, jax.tree.leaves(cache.index_keys), strict=True):
        want = old.copy()
        for source, target in copies:
            want[target] = old[source]
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), want)
    lengths = jnp.full(BATCH, TOPK + 2, jnp.int32)
    cache = cache.with_rows(jnp.asarray(allocator.table(rows)), lengths)
    want = whole(model(seed), sequences)
    for i in range(2):
        logits, cache = step()(model(seed), tails[:, i], cache)
        np.testing.assert_allclose(logits, want[:, TOPK + 2 + i], rtol=0, atol=2e-5)


def test_fp8_latents(seed, rng):
    """Latents in FP8 move the logits by its rounding, the keys of the indexer not at all."""
    tokens, table = make_tokens(rng, BATCH, TOPK + 4), int(rng.integers(2**31))
    counts = jnp.full(BATCH, TOPK + 4, jnp.int32)
    results = []
    for dtype in (None, FP8):
        cache = make_cache(np.random.default_rng(table), dtype=dtype)
        _, cache = fill()(model(seed), tokens, cache, counts=counts)
        first = np.asarray(cache.index_keys[0].values).view(np.uint8)
        logits, _ = step()(model(seed), tokens[:, 0], cache)
        results.append((np.asarray(logits), first))
    (plain, keys), (fp8, same_keys) = results
    np.testing.assert_array_equal(same_keys, keys)
    assert 0 < np.median(np.abs(fp8 - plain)) < 0.1 * plain.std()


def test_refusals(seed, rng):
    tokens = jnp.zeros(BATCH, jnp.int32)
    with pytest.raises(ValueError, match=r"^cache: got no indexer's keys, expected one, by the mo"):
        decode_step(model(seed), tokens, make_cache(rng, DENSE))
    with pytest.raises(
        ValueError, match=r"^cache: got an indexer's keys, expected none, by the mo"
    ):
        decode_step(dense_model(seed), tokens, make_cache(rng))
    layer = model(seed).layers[0].attn
    cache = AbsorbCache.create(CONFIG.mla, batch=1, max_seq_len=TOPK + 1)
    x = jnp.ones((1, 3, 32))
    with pytest.raises(ValueError, match=r"^cache: got room for 65 tokens, expected at most self"):
        jax.eval_shape(layer, x, cache)
    jax.eval_shape(layer, x, AbsorbCache.create(CONFIG.mla, batch=1, max_seq_len=TOPK))
    with pytest.raises(
        ValueError, match=r"^mesh: got context=2, expected 1 for a model with an in"
    ):
        check_mesh(CONFIG, mesh_of({"context": 2}))
    v32 = presets["deepseek-v3.2"]
    sixteen = dataclasses.replace(v32, mla=dataclasses.replace(v32.mla, n_heads=16))
    with pytest.raises(NotImplementedError, match="index_n_heads is 64, expected 0"):
        megakernel.plan_decode(sixteen, [100], steps=32)
    with pytest.raises(NotImplementedError, match=r"^backend 'mosaic_gpu' cannot run this token"):
        jax.eval_shape(
            lambda cache: decode_step(model(seed), tokens, cache, backend="mosaic_gpu"),
            make_cache(rng),
        )
