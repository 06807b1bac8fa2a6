"""Models with an indexer: a decoder that attends to the tokens it chose, over pages."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from index_choice import check_choice, scores_of
from indexed import (
    BATCH,
    CONFIG,
    MAX_PAGES,
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
from oracles import QUICK_COMPILE, float64

from mla_jax import Decoder, PagedLatentCache, decode_step, generate, prefill
from mla_jax.indexer import select_keys
from mla_jax.nn import Indexer
from mla_jax.rope import rotation
from mla_jax.sharding import shard_model
from mla_jax.sharding.plan import plan_decode


@pytest.fixture
def chosen(monkeypatch) -> list[np.ndarray]:
    """The positions that programs compiled from now on choose, one entry a layer and call."""
    made: list[np.ndarray] = []

    def recorded(*args):
        positions = select_keys(*args)
        jax.debug.callback(lambda x: made.append(np.asarray(x)), positions, ordered=True)
        return positions

    monkeypatch.setattr("mla_jax.nn.indexer.select_keys", recorded)
    return made


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def given_the_choice(model: Decoder, tokens: jax.Array, visible: jax.Array):
    """Whole sequences, layer i under the mask visible[i]: (logits, what the indexers multiply)."""
    rope = rotation(model.config.mla, jnp.arange(tokens.shape[1], dtype=jnp.int32))
    x, vectors = model.embed[...][tokens], []
    for layer, mask in zip(model.layers, visible, strict=True):
        hidden, indexer = layer.attn_norm(x), layer.attn.indexer
        assert indexer is not None
        vectors.append(indexer.project(hidden, layer.attn.query_latent(hidden), rope))
        with mock.patch.object(Indexer, "visible", return_value=mask):
            x = layer(x)
    return model.logits(x), vectors


def test_pages(seed, rng, chosen):
    """Ragged chunks and steps, rows shorter and longer than index_topk, one without a page.

    The choice is checked by float64's scores, and the logits by the forward without a cache under
    that choice: a key whose score is as good as another's may be chosen in either's place.
    """
    total, chunks = 88, ((50, 0, 13), (34, 61, 0))
    tokens = make_tokens(rng, BATCH, total)
    cache, lengths = make_cache(rng), np.zeros(BATCH, int)
    cache = cache.with_rows(cache.block_table.at[2, 1:].set(-1), cache.lengths)
    run, got = jitted(prefill), {}
    visible = np.zeros((CONFIG.n_layers, BATCH, total, total), bool)
    choices: dict[tuple[int, int, int], np.ndarray] = {}

    def keep(logits, counts):
        jax.effects_barrier()
        assert len(chosen) == CONFIG.n_layers
        for layer, positions in enumerate(chosen):
            for row in range(BATCH):
                for i, ids in enumerate(positions[row]):
                    if i >= counts[row]:
                        assert (ids == -1).all()
                        continue
                    choices[layer, row, lengths[row] + i] = ids
                    visible[layer, row, lengths[row] + i, ids[ids >= 0]] = True
        chosen.clear()
        lengths[:] += counts
        for row in np.flatnonzero(counts):
            got[row, lengths[row] - 1] = np.asarray(logits[row])

    for counts in chunks:
        at = np.minimum(lengths[:, None] + np.arange(61), total - 1)
        chunk = jnp.take_along_axis(tokens, jnp.asarray(at), axis=1)
        logits, cache = run(model(seed), chunk, cache, counts=jnp.asarray(counts, jnp.int32))
        keep(logits, np.asarray(counts))
    for kernels in ({"backend": "reference"}, {"backend": "triton", "interpret": True}):
        run = jitted(decode_step, **kernels)
        for _ in range(2):
            logits, cache = run(model(seed), tokens[np.arange(BATCH), lengths], cache)
            keep(logits, np.asarray([1, 1, lengths[2] < PAGE]))
    np.testing.assert_array_equal(cache.lengths, lengths)
    np.testing.assert_array_equal(lengths, [88, 65, PAGE])

    for row, length in enumerate(lengths):  # where nothing was cached, anything but nothing
        visible[:, row, length:, 0] = True
    want, vectors = given_the_choice(model(seed), tokens, jnp.asarray(visible))
    for (row, at), logits in got.items():
        np.testing.assert_allclose(logits, want[row, at], rtol=0, atol=2e-5)
    for layer, (q, k, weights) in enumerate(vectors):
        scores = scores_of(q, k, weights)
        for row, length in enumerate(lengths):
            ids = np.stack([choices[layer, row, at] for at in range(length)])
            check_choice(ids[None], scores[row : row + 1], np.arange(length)[None], TOPK)


def test_whole_sequences(seed, rng):
    """The forward without a cache, in both forms: the indexer's choice, and nothing else."""
    layer = model(seed).layers[0].attn
    indexer = layer.indexer
    assert indexer is not None
    x = jnp.asarray(rng.standard_normal((2, 80, 32)), jnp.float32)
    rope = rotation(CONFIG.mla, jnp.arange(80, dtype=jnp.int32))

    def run(x):
        q_nope, q_pe, ckv, kpe = layer.project(x, rope)
        heads = jnp.concatenate([q_nope, q_pe], axis=-1), *layer.expand(ckv, kpe)
        ids = indexer(x, layer.query_latent(x), rope)
        return heads, ids, (layer(x, attn_impl="naive"), layer(x, attn_impl="absorb"))

    heads, ids, outs = jax.jit(run, compiler_options=QUICK_COMPILE)(x)
    q, k, v = (float64(array) for array in heads)
    values = np.zeros(v.shape)
    for b, i in np.ndindex(2, 80):
        seen = np.asarray(ids[b, i])
        seen = seen[seen >= 0]
        assert len(seen) == min(i + 1, TOPK)
        scores = np.einsum("hd,thd->ht", q[b, i], k[b, seen]) * CONFIG.mla.softmax_scale
        probs = np.exp(scores - scores.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        values[b, i] = np.einsum("ht,thv->hv", probs, v[b, seen])
    want = values.reshape(2, 80, -1) @ float64(layer.wo.weight[...]).T
    for out in outs:
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-5)


def test_no_more_tokens_than_index_topk_is_dense(seed, rng):
    """Up to index_topk tokens everything is chosen; the next one leaves some out."""
    tokens = make_tokens(rng, BATCH, TOPK + 4)
    counts = jnp.asarray([TOPK - 3, 1, TOPK - 1], jnp.int32)
    want = np.asarray(whole(dense_model(seed), tokens))
    logits, cache = fill()(model(seed), tokens, make_cache(rng), counts=counts)
    lengths, rows = np.asarray(counts), np.arange(BATCH)
    while lengths.max() < TOPK + 2:
        error = np.abs(np.asarray(logits) - want[rows, lengths - 1]).max(axis=1)
        assert (error[lengths <= TOPK] < 2e-5).all()
        assert (error[lengths > TOPK] > 1e-3).all()
        logits, cache = step()(model(seed), tokens[rows, lengths], cache)
        lengths = lengths + 1


def test_a_table_of_index_topk_tokens_needs_no_choice(seed, rng):
    """The dense kernels run, and the keys are written all the same: a wider table may follow."""
    tokens, counts = make_tokens(rng, BATCH, TOPK + 4), jnp.full(BATCH, 60, jnp.int32)
    narrow = make_cache(rng)
    narrow = narrow.with_rows(narrow.block_table[:, : TOPK // PAGE], narrow.lengths)
    wide = make_cache(np.random.default_rng(rng.integers(2**31)))
    part = tokens[:, :60]
    texts = [fill().lower(model(seed), part, cache).as_text() for cache in (narrow, wide)]
    assert ["top_k" in text for text in texts] == [False, True]
    table = np.asarray(narrow.block_table)
    logits, narrow = fill()(model(seed), part, narrow)
    wide = wide.with_rows(wide.block_table.at[:, : TOPK // PAGE].set(table), wide.lengths)
    want, wide = fill()(model(seed), tokens, wide, counts=counts)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)
    written = np.asarray([places_of(row, 60) for row in table]).reshape(-1)
    for ours, theirs in zip(narrow.index_keys, wide.index_keys, strict=True):
        keys = [
            (float64(pool.values) * float64(pool.scales)).reshape(-1, 32)[written]
            for pool in (ours, theirs)
        ]
        # Of e4m3, the last bit of three.
        np.testing.assert_allclose(*keys, rtol=0.15, atol=1e-2)


def places_of(pages: np.ndarray, tokens: int) -> np.ndarray:
    at = np.arange(tokens)
    return pages[at // PAGE] * PAGE + at % PAGE


def test_generate(seed, rng):
    """Prompts on both sides of index_topk: each next token is the forward's likeliest."""
    lengths = TOPK + 1, 3, TOPK - 2
    prompts = [rng.integers(0, CONFIG.vocab, length).tolist() for length in lengths]
    shallow = model(seed, dataclasses.replace(CONFIG, n_layers=1))
    made = generate(shallow, prompts, max_new_tokens=3)
    sequences = np.zeros((BATCH, TOPK + 4), np.int32)
    for row, prompt, new in zip(sequences, prompts, made, strict=True):
        row[: len(prompt) + 3] = [*prompt, *new]
    logits = np.asarray(whole(shallow, jnp.asarray(sequences)))
    for row, length, new in zip(logits, lengths, made, strict=True):
        assert row[length - 1 : length + 2].argmax(axis=-1).tolist() == new


def test_mesh(seed, rng):
    """Rows dealt out over `data`, heads over `model`; the plan counts the indexer's bytes."""
    mesh = mesh_of({"data": 3, "model": 2})
    tokens = make_tokens(rng, BATCH, TOPK + 4)
    want = whole(model(seed), tokens)
    cache = PagedLatentCache.create(
        CONFIG,
        num_pages=BATCH * MAX_PAGES,
        page_size=PAGE,
        max_batch=BATCH,
        max_pages=MAX_PAGES,
        mesh=mesh,
    )
    table = np.stack([rng.permutation(MAX_PAGES) for _ in range(BATCH)]).astype(np.int32)
    table = jax.device_put(table, cache.block_table.sharding)
    cache = cache.with_rows(table, cache.lengths)
    sharded = shard_model(model(seed), mesh)

    def put(array):
        return jax.device_put(array, cache.lengths.sharding)

    with jax.set_mesh(mesh):
        _, cache = jitted(prefill)(sharded, put(tokens[:, :-1]), cache)
        program = jitted(decode_step).lower(sharded, put(tokens[:, -1]), cache).compile()
        logits, cache = program(sharded, put(tokens[:, -1]), cache)
    np.testing.assert_allclose(logits, want[:, -1], rtol=0, atol=3e-5)
    plan = plan_decode(
        CONFIG, batch=BATCH, tokens=MAX_PAGES * PAGE, page_size=PAGE, data=3, model=2
    )
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == plan.weight_bytes + plan.cache_bytes + 4
    assert memory.alias_size_in_bytes == plan.cache_bytes
