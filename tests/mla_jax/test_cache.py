"""`PagedLatentCache`: what is made, and what is written where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax import MLAConfig, ModelConfig, PagedLatentCache, presets
from mla_jax.cache import write_pages

LATENT, ROPE, PAGE, BATCH, MAX_PAGES, NUM_PAGES = 6, 4, 5, 3, 4, 14
CONFIG = ModelConfig(
    vocab=1,
    n_layers=2,
    inter_dim=1,
    mla=MLAConfig(dim=1, n_heads=1, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, dtype="float32"),
)


def empty_cache(**sizes) -> PagedLatentCache:
    shape = {"num_pages": NUM_PAGES, "page_size": PAGE, "max_batch": BATCH, "max_pages": MAX_PAGES}
    return PagedLatentCache.create(CONFIG, **{**shape, **sizes})


class TestCreate:
    def test_shapes(self):
        cache = empty_cache(page_size=8, num_pages=5)
        assert [pool.shape for pool in cache.ckv] == [(5, 8, LATENT)] * 2
        assert [pool.shape for pool in cache.kpe] == [(5, 8, ROPE)] * 2
        np.testing.assert_array_equal(cache.block_table, np.full((BATCH, MAX_PAGES), -1))
        np.testing.assert_array_equal(cache.lengths, [0] * BATCH)
        assert (cache.num_pages, cache.page_size, cache.max_batch) == (5, 8, BATCH)
        assert cache.max_length == MAX_PAGES * 8
        # Since jax 0.11 an `empty` pool may hold NaN, and 0 * NaN poisons a product.
        assert all(np.all(np.asarray(pool) == 0) for pool in (*cache.ckv, *cache.kpe))

    @pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
    def test_dtype(self, dtype):
        assert {pool.dtype for pool in empty_cache(dtype=dtype).ckv} == {jnp.dtype(dtype)}

    def test_default_dtype(self):
        cache = PagedLatentCache.create(
            presets["deepseek-v2-lite"], num_pages=1, page_size=1, max_batch=1, max_pages=1
        )
        assert len(cache.ckv) == 27
        assert cache.ckv[0].dtype == jnp.bfloat16

    @pytest.mark.parametrize("name", ["num_pages", "page_size", "max_batch", "max_pages"])
    def test_bad_size(self, name):
        with pytest.raises(ValueError, match=f"^{name}: got 0, expected at least 1$"):
            empty_cache(**{name: 0})


@jax.jit
def write(cache: PagedLatentCache, count, rows):
    view = cache.view(rows.shape[1], count)
    return view, write_pages(cache.ckv[0], view, rows)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_append(data, seed):
    """Every new token goes to its page, or nowhere: a row stops at its first missing page."""
    tokens, capacity = 12, MAX_PAGES * PAGE
    rng = np.random.default_rng(seed)
    table = rng.permutation(NUM_PAGES)[: BATCH * MAX_PAGES].reshape(BATCH, MAX_PAGES)
    for row in table:
        row[list(data.draw(st.sets(st.integers(0, MAX_PAGES - 1))))] = -1
    lengths = [data.draw(st.integers(0, capacity + 2)) for _ in range(BATCH)]
    count = [data.draw(st.integers(0, tokens)) for _ in range(BATCH)]
    pool = rng.standard_normal((NUM_PAGES, PAGE, LATENT)).astype(np.float32)
    rows = rng.standard_normal((BATCH, tokens, LATENT)).astype(np.float32)

    want, want_lengths = pool.copy(), list(lengths)
    for b in range(BATCH):
        for i in range(count[b]):
            column, slot = divmod(lengths[b] + i, PAGE)
            if column >= MAX_PAGES or table[b, column] < 0:
                break
            want[table[b, column], slot] = rows[b, i]
            want_lengths[b] += 1

    cache = dataclasses.replace(
        empty_cache(),
        ckv=(jnp.asarray(pool),) * 2,
        block_table=jnp.asarray(table, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
    )
    view, got = write(cache, jnp.asarray(count, jnp.int32), jnp.asarray(rows))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(view.length, want_lengths)
    np.testing.assert_array_equal(view.positions, np.add.outer(lengths, np.arange(tokens)))


class TestCopyPages:
    def test_copies(self, rng):
        widths = LATENT, LATENT, ROPE, ROPE
        pools = [
            rng.standard_normal((NUM_PAGES, PAGE, width)).astype(np.float32) for width in widths
        ]
        cache = dataclasses.replace(
            empty_cache(),
            ckv=tuple(jnp.asarray(pool) for pool in pools[:2]),
            kpe=tuple(jnp.asarray(pool) for pool in pools[2:]),
        )
        source, target = jnp.asarray([4, 0, 4, 2]), jnp.asarray([1, 3, 9, NUM_PAGES])
        copied = jax.jit(PagedLatentCache.copy_pages)(cache, source, target)
        for old, new in zip(pools, copied.ckv + copied.kpe, strict=True):
            want = old.copy()
            want[1], want[3], want[9] = old[4], old[0], old[4]  # the last target is no page
            np.testing.assert_array_equal(new, want)
        np.testing.assert_array_equal(copied.lengths, cache.lengths)
        np.testing.assert_array_equal(copied.block_table, cache.block_table)

    def test_none(self):
        none = jnp.zeros(0, jnp.int32)
        cache = empty_cache().copy_pages(none, none)
        assert cache.ckv[0].shape == (NUM_PAGES, PAGE, LATENT)
