"""`prefill` and `decode_step`: a loop over a paged cache that compiles once, in place."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from oracles import QUICK_COMPILE

from mla_jax import (
    Decoder,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    PageAllocator,
    PagedLatentCache,
    decode_step,
    prefill,
)

# Sizes that the Triton kernels take; a dense layer and one of experts.
CONFIG = ModelConfig(
    vocab=40,
    n_layers=2,
    inter_dim=32,
    n_dense=1,
    mla=MLAConfig(
        dim=32,
        n_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=8,
        dtype="float32",
    ),
    moe=MoEConfig(n_routed=4, n_active=2, inter_dim=16, n_shared=1),
)
PAGE, BATCH, MAX_PAGES, NUM_PAGES = 16, 3, 3, 11
KERNELS = {
    "reference": {"backend": "reference"},
    "triton": {"backend": "triton", "interpret": True},
}


@functools.cache
def split_model(seed: int):
    return nnx.split(drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)), seed))


@pytest.fixture
def model(seed) -> Decoder:
    return nnx.merge(*split_model(seed))


def empty_cache() -> PagedLatentCache:
    return PagedLatentCache.create(
        CONFIG, num_pages=NUM_PAGES, page_size=PAGE, max_batch=BATCH, max_pages=MAX_PAGES
    )


def random_table(rng: np.random.Generator, pages=(MAX_PAGES,) * BATCH) -> np.ndarray:
    """Row b owns pages[b] pages, drawn at random from the pool."""
    table = np.full((len(pages), MAX_PAGES), -1, np.int32)
    free = list(rng.permutation(NUM_PAGES))
    for row, count in zip(table, pages, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    return table


def with_table(cache: PagedLatentCache, table: np.ndarray) -> PagedLatentCache:
    return cache.with_rows(jnp.asarray(table), cache.lengths)


def jitted(function, seed: int, **options):
    """function(weights, tokens, cache, ...) with the cache donated, and the weights."""
    definition, weights = split_model(seed)

    def run(weights, tokens, cache, **values):
        return function(nnx.merge(definition, weights), tokens, cache, **options, **values)

    return functools.partial(
        jax.jit(run, donate_argnums=2, compiler_options=QUICK_COMPILE), weights
    )


@functools.cache
def step(seed: int):
    return jitted(decode_step, seed)


@functools.cache
def fill(seed: int):
    return jitted(prefill, seed)


def make_tokens(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(0, CONFIG.vocab, shape), jnp.int32)


class TestDecode:
    """The loop, against the decoder's own forward over whole sequences."""

    def test_equals_the_decoder(self, seed, rng, model):
        """Prompts of different lengths in two chunks, then steps over a page's edge."""
        prompts, total = np.asarray([13, 1, 20]), 24
        tokens = make_tokens(rng, BATCH, total)
        want = jax.jit(lambda tokens: model(tokens))(tokens)
        cache = with_table(empty_cache(), random_table(rng))
        first = np.minimum(prompts, 9)
        for start, count in ((np.zeros_like(first), first), (first, prompts - first)):
            at = np.minimum(start[:, None] + np.arange(11), total - 1)
            chunk = jnp.take_along_axis(tokens, jnp.asarray(at), axis=1)
            logits, cache = fill(seed)(chunk, cache, counts=jnp.asarray(count, jnp.int32))
            for b in np.flatnonzero(count):
                last = start[b] + count[b] - 1
                np.testing.assert_allclose(logits[b], want[b, last], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(cache.lengths, prompts)
        for i in range(4):
            at = prompts + i
            logits, cache = step(seed)(tokens[np.arange(BATCH), at], cache)
            np.testing.assert_allclose(logits, want[np.arange(BATCH), at], rtol=0, atol=2e-5)

    def test_paused_rows_stand_still(self, seed, rng):
        """Rows without a page: one empty, one whose next token needs a page that it lacks."""
        table = random_table(rng, pages=(2, 0, 1))
        cache = with_table(empty_cache(), table)
        prompt = make_tokens(rng, BATCH, PAGE)
        _, cache = fill(seed)(prompt, cache, counts=jnp.asarray([5, 0, PAGE], jnp.int32))
        before = jax.tree.map(np.asarray, cache)
        for i in range(3):
            _, cache = step(seed)(make_tokens(rng, BATCH), cache)
            np.testing.assert_array_equal(cache.lengths, [6 + i, 0, PAGE])
        for old, new in zip(before.ckv + before.kpe, cache.ckv + cache.kpe, strict=True):
            changed = {(page, slot) for page, slot, _ in np.argwhere(old != np.asarray(new))}
            assert changed == {(table[0, 0], slot) for slot in (5, 6, 7)}

    def test_a_row_resumes(self, seed, rng):
        """A paused row that gets its page continues as if it had never paused."""
        tokens = make_tokens(rng, BATCH, PAGE + 1)
        full = random_table(rng, pages=(2, 2, 2))
        short = full.copy()
        short[1, 1] = -1

        _, cache = fill(seed)(tokens[:, :PAGE], with_table(empty_cache(), full))
        want, _ = step(seed)(tokens[:, PAGE], cache)
        _, cache = fill(seed)(tokens[:, :PAGE], with_table(empty_cache(), short))
        for _ in range(2):
            _, cache = step(seed)(make_tokens(rng, BATCH), cache)
        np.testing.assert_array_equal(cache.lengths, [PAGE + 2, PAGE, PAGE + 2])
        got, _ = step(seed)(tokens[:, PAGE], with_table(cache, full))
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-6)

    def test_full_rows_stand_still(self, seed, rng):
        """A row as long as its table takes nothing more, and nothing else is overwritten."""
        cache = with_table(empty_cache(), random_table(rng))
        lengths = jnp.asarray([MAX_PAGES * PAGE, MAX_PAGES * PAGE - 1, 4], jnp.int32)
        cache = cache.with_rows(cache.block_table, lengths)
        for want in ([48, 48, 5], [48, 48, 6]):
            before = np.asarray(cache.ckv[1])
            _, cache = step(seed)(make_tokens(rng, BATCH), cache)
            np.testing.assert_array_equal(cache.lengths, want)
            written = (before != np.asarray(cache.ckv[1])).any(axis=-1).sum()
            assert written == (2 if want[2] == 5 else 1)

    def test_shared_prefix(self, seed, rng):
        """Copy-on-write: two rows share a prompt's pages, and then go their own ways."""
        prompt, tails = make_tokens(rng, 1, PAGE + 4), make_tokens(rng, BATCH, 3)
        allocator = PageAllocator(NUM_PAGES, page_size=PAGE, max_pages=MAX_PAGES)
        root = allocator.allocate(PAGE + 4)
        rows = [root, None, None]
        cache = with_table(empty_cache(), allocator.table(rows))
        counts = jnp.asarray([PAGE + 4, 0, 0], jnp.int32)
        _, cache = fill(seed)(jnp.tile(prompt, (BATCH, 1)), cache, counts=counts)

        rows = [root, allocator.fork(root), allocator.fork(root)]
        copies = [pair for row in rows for pair in allocator.extend(row, 3)]
        assert len(copies) == 2
        source, target = jnp.asarray(copies, jnp.int32).T
        cache = cache.copy_pages(source, target)
        cache = cache.with_rows(
            jnp.asarray(allocator.table(rows)), jnp.full(BATCH, PAGE + 4, jnp.int32)
        )
        definition, weights = split_model(seed)
        whole = jnp.concatenate([jnp.tile(prompt, (BATCH, 1)), tails], axis=1)
        want = jax.jit(lambda tokens: nnx.merge(definition, weights)(tokens))(whole)
        for i in range(3):
            logits, cache = step(seed)(tails[:, i], cache)
            np.testing.assert_allclose(logits, want[:, PAGE + 4 + i], rtol=0, atol=2e-5)

    def test_scan_equals_the_loop(self, seed, rng):
        """Greedy decoding with what a user writes: a scan over decode_step."""
        definition, weights = split_model(seed)

        @functools.partial(jax.jit, donate_argnums=1)
        def scan(weights, cache, first):
            def body(carry, _):
                token, cache = carry
                logits, cache = decode_step(nnx.merge(definition, weights), token, cache)
                token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                return (token, cache), (token, logits)

            (_, cache), (tokens, logits) = jax.lax.scan(body, (first, cache), length=20)
            return tokens, logits, cache

        table, first = random_table(rng), make_tokens(rng, BATCH)
        tokens, logits, scanned = scan(weights, with_table(empty_cache(), table), first)
        cache, token = with_table(empty_cache(), table), first
        for want_token, want_logits in zip(tokens, logits, strict=True):
            got, cache = step(seed)(token, cache)
            np.testing.assert_allclose(got, want_logits, rtol=0, atol=1e-5)
            token = want_token
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(scanned), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
    def test_compiles_once(self, seed, rng, kernels):
        """From the first token over two pages' edges, with rows that pause and tables that move."""
        traces = 0

        def counted(*args, **options):
            nonlocal traces
            traces += 1
            return decode_step(*args, **options)

        run = jitted(counted, seed, **kernels)
        cache = with_table(empty_cache(), random_table(rng, pages=(3, 2, 1)))
        for i in range(2 * PAGE + 2):
            _, cache = run(make_tokens(rng, BATCH), cache)
            if i == PAGE:
                cache = with_table(cache, random_table(rng, pages=(3, 2, 2)))
        np.testing.assert_array_equal(cache.lengths, [34, 32, 32])
        assert traces == 1
        assert run.func._cache_size() == 1

    def test_backends_agree(self, seed, rng):
        table = random_table(rng)
        first = make_tokens(rng, BATCH, PAGE + 1)
        counts = jnp.asarray([PAGE + 1, 3, 0], jnp.int32)
        steps = [make_tokens(rng, BATCH) for _ in range(2)]
        results = []
        for kernels in KERNELS.values():
            run = jitted(decode_step, seed, **kernels)
            _, cache = fill(seed)(first, with_table(empty_cache(), table), counts=counts)
            for token in steps:
                logits, cache = run(token, cache)
            results.append(logits)
        np.testing.assert_allclose(*results, rtol=0, atol=2e-5)


class TestInPlace:
    """The compiled step's HLO: the pools are updated where they lie."""

    @staticmethod
    @functools.cache
    def hlo(seed: int, donated: bool) -> str:
        definition, weights = split_model(seed)

        def run(weights, tokens, cache):
            return decode_step(nnx.merge(definition, weights), tokens, cache)

        compiled = jax.jit(run, donate_argnums=(2,) if donated else ())
        args = weights, jnp.zeros(BATCH, jnp.int32), empty_cache()
        return compiled.lower(*args).compile().as_text() or ""

    @staticmethod
    def pool_copies(hlo: str) -> list[str]:
        pool = rf"f32\[{NUM_PAGES},{PAGE},16\]\S* (?:copy|copy-start)\("
        return [line for line in hlo.splitlines() if re.search(pool, line)]

    def test_pools_are_aliased(self, seed):
        hlo = self.hlo(seed, donated=True)
        header = hlo.splitlines()[0]
        aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
        layout = re.search(r"entry_computation_layout=\{\((.*)\)->\((.*?)\)\}", header)
        assert layout is not None
        inputs, outputs = (
            re.findall(r"\w+\[[\d,]*\]", side) for side in (layout.group(1), layout.group(2))
        )
        pool = f"f32[{NUM_PAGES},{PAGE},16]"
        assert inputs.count(pool) == outputs.count(pool) == 2 * CONFIG.n_layers
        aliased = {int(out): int(arg) for out, arg in aliases}
        for out, shape in enumerate(outputs):
            if shape == pool:
                assert inputs[aliased[out]] == pool
        assert len(set(aliased.values())) == len(aliased)

    def test_no_copy_of_a_pool(self, seed):
        assert self.pool_copies(self.hlo(seed, donated=True)) == []

    def test_a_copy_would_be_seen(self, seed):
        """Without donation there is one for each pool: the search finds what it looks for."""
        assert len(self.pool_copies(self.hlo(seed, donated=False))) >= 2 * CONFIG.n_layers

    def test_donated(self, seed, rng):
        cache = with_table(empty_cache(), random_table(rng))
        _, after = step(seed)(make_tokens(rng, BATCH), cache)
        assert all(pool.is_deleted() for pool in jax.tree.leaves((cache.ckv, cache.kpe)))
        assert not any(pool.is_deleted() for pool in jax.tree.leaves((after.ckv, after.kpe)))


class TestErrors:
    def test_batch(self, model):
        with pytest.raises(ValueError, match=r"^tokens: got 2 rows, expected cache.max_batch=3$"):
            decode_step(model, jnp.zeros(2, jnp.int32), empty_cache())

    def test_layers(self, model):
        cache = empty_cache()
        cache = dataclasses.replace(cache, ckv=cache.ckv[:1], kpe=cache.kpe[:1])
        with pytest.raises(ValueError, match=r"^cache: got 1 layers, expected the model's 2$"):
            decode_step(model, jnp.zeros(BATCH, jnp.int32), cache)

    def test_prompt_longer_than_the_cache(self, model):
        tokens = jnp.zeros((BATCH, MAX_PAGES * PAGE + 1), jnp.int32)
        with pytest.raises(ValueError, match=r"^tokens: got 49 a row, the cache holds 48$"):
            prefill(model, tokens, empty_cache())

    @pytest.mark.parametrize("call", [decode_step, prefill])
    def test_unknown_backend(self, model, call):
        shape = (BATCH,) if call is decode_step else (BATCH, 2)
        tokens = jnp.zeros(shape, jnp.int32)
        with pytest.raises(ValueError, match=r"^backend: got 'cuda', expected None or one of "):
            jax.eval_shape(lambda cache: call(model, tokens, cache, backend="cuda"), empty_cache())
