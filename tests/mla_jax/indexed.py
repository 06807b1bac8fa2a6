"""A small model with an indexer, its paged caches, and programs that several tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from drawn import drawn
from flax import nnx
from oracles import QUICK_COMPILE

from mla_jax import Decoder, MLAConfig, ModelConfig, PagedLatentCache, decode_step, prefill

TOPK, PAGE, BATCH, MAX_PAGES, NUM_PAGES = 64, 16, 3, 6, 20
# Sizes that the Triton kernels take.
CONFIG = ModelConfig(
    vocab=40,
    n_layers=2,
    inter_dim=32,
    mla=MLAConfig(
        dim=32,
        n_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=8,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=TOPK,
        dtype="float32",
    ),
)
DENSE = dataclasses.replace(CONFIG, mla=dataclasses.replace(CONFIG.mla, index_n_heads=0))


@functools.cache
def model(seed: int, config: ModelConfig = CONFIG) -> Decoder:
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)


@functools.cache
def dense_model(seed: int) -> Decoder:
    """The same weights without the indexer's."""
    weights = dict(nnx.to_flat_state(nnx.state(model(seed))))
    dense = nnx.eval_shape(lambda: Decoder(DENSE, rngs=nnx.Rngs(0)))
    state = nnx.state(dense)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(weights[path].get_value())
    nnx.update(dense, state)
    return dense


def make_tokens(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(0, CONFIG.vocab, shape), jnp.int32)


def make_cache(rng: np.random.Generator, config=CONFIG, dtype=None) -> PagedLatentCache:
    """Rows of random pages; what no token was written to is NaN, in every pool."""
    cache = PagedLatentCache.create(
        config,
        num_pages=NUM_PAGES,
        page_size=PAGE,
        max_batch=BATCH,
        max_pages=MAX_PAGES,
        dtype=dtype,
    )
    table = rng.permutation(NUM_PAGES)[: BATCH * MAX_PAGES].reshape(BATCH, MAX_PAGES)
    poisoned = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache)
    return poisoned.with_rows(jnp.asarray(table, jnp.int32), cache.lengths)


def jitted(function, **options):
    run = functools.partial(function, **options)
    return jax.jit(run, donate_argnums=2, compiler_options=QUICK_COMPILE)


@functools.cache
def fill():
    return jitted(prefill)


@functools.cache
def step():
    return jitted(decode_step)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def whole(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)
