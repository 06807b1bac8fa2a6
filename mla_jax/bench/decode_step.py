"""The decode step and its kernels: milliseconds a token beside the bytes that must move.

A step's floor: every weight once, of the experts only those that some token chose (counted from
the routers), the cache of every row once (of the latents only those that an indexer may choose),
at the bandwidth measured in the same run.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.allocator import PageAllocator
from mla_jax.bench.timing import compilations, microseconds_a_call, seconds_a_run
from mla_jax.cache import PagedLatentCache
from mla_jax.config import ModelConfig
from mla_jax.generate import BLOCK_STEPS, decode_block
from mla_jax.nn import Decoder
from mla_jax.nn.decoder import KernelChoice
from mla_jax.nn.feed_forward import MoE
from mla_jax.quantization import QuantizedPool
from mla_jax.rope import rotation
from mla_jax.sampling import Sampler
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.paged_decode import paged_decode

Row = dict[str, Any]
PAGE = 64


def random_pages(batch: int, length: int, seed: int) -> tuple[np.ndarray, int]:
    """A table that gives each row pages for `length` tokens in random order, and their number."""
    per_row = -(-length // PAGE)
    order = np.random.default_rng(seed).permutation(batch * per_row)
    return order.reshape(batch, per_row).astype(np.int32), batch * per_row


def bench_attention(batch: int, heads: int, length: int, ceiling: float, seed: int = 0) -> Row:
    """The paged decode kernel, merge included, at DeepSeek's widths in bfloat16."""
    table, num_pages = random_pages(batch, length, seed)
    keys = jax.random.split(jax.random.key(seed), 4)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    q_nope, q_pe = normal(keys[0], batch, 1, heads, 512), normal(keys[1], batch, 1, heads, 64)
    pools = normal(keys[2], num_pages, PAGE, 512), normal(keys[3], num_pages, PAGE, 64)
    pages = (
        jnp.asarray(table.reshape(-1)),
        jnp.arange(batch, dtype=jnp.int32) * table.shape[1],
        jnp.full(batch, length, jnp.int32),
    )

    def call(q_nope: jax.Array, *rest: jax.Array) -> jax.Array:
        return paged_decode(q_nope, *rest, sm_scale=192**-0.5)[0]

    micros = microseconds_a_call(call, q_nope, q_pe, *pools, *pages)
    moved = batch * length * 1152 + batch * heads * 1088 * 2
    gb_s = moved / micros / 1e3
    return {
        "op": "paged_decode",
        "shape": f"B{batch} h{heads} s{length}",
        "dtype": "bfloat16",
        "ours_us": micros,
        "gb_s": gb_s,
        "tflop_s": 2 * batch * heads * length * 1088 / micros / 1e6,
        "of_bandwidth": gb_s / ceiling,
    }


def bench_experts(config: ModelConfig, batch: int, ceiling: float, seed: int = 0) -> Row:
    """One layer's routed experts with uniformly random routing."""
    moe, dim = config.moe, config.mla.dim
    if moe is None:
        raise ValueError("config: got a model without experts, expected one with")
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(moe.n_routed)[: moe.n_active] for _ in range(batch)])
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (batch, dim), jnp.bfloat16)
    scale = jnp.asarray(dim**-0.5, jnp.bfloat16)
    shape = (moe.n_routed, 2, moe.inter_dim, dim)
    gate_up = jax.random.normal(keys[1], shape, jnp.bfloat16) * scale
    down = jax.random.normal(keys[2], (moe.n_routed, dim, moe.inter_dim), jnp.bfloat16) * scale
    weights = jnp.ones(ids.shape, jnp.float32)
    micros = microseconds_a_call(expert_ffn, x, jnp.asarray(ids, jnp.int32), weights, gate_up, down)
    experts = len(np.unique(ids))
    moved = experts * 3 * dim * moe.inter_dim * 2
    return {
        "op": "expert_ffn",
        "shape": f"B{batch} E{moe.n_routed} k{moe.n_active} {dim}x{moe.inter_dim}",
        "dtype": "bfloat16",
        "ours_us": micros,
        "experts_read": experts,
        "gb_s": moved / micros / 1e3,
        "of_bandwidth": moved / micros / 1e3 / ceiling,
    }


def experts_chosen(model: Decoder, tokens: jax.Array, cache: PagedLatentCache) -> list[jax.Array]:
    """The experts that each MoE layer's router picks in one step: ids [batch, active]."""
    view = cache.view(1, jnp.ones_like(cache.lengths))
    rope = rotation(model.config.mla, view.positions)
    x = model.embed[...][tokens[:, None]]
    chosen, kernels = [], KernelChoice()
    index_keys = cache.index_keys or (None,) * len(model.layers)
    for layer, ckv, kpe, index in zip(model.layers, cache.ckv, cache.kpe, index_keys, strict=True):
        x, *_ = layer.attend(x, ckv, kpe, index, view, rope, kernels)
        if isinstance(layer.ffn, MoE):
            rows = layer.ffn_norm(x).reshape(x.shape[0], -1)
            chosen.append(layer.ffn.router(rows)[0])
        x = layer.feed_forward(x, kernels)
    return chosen


def bytes_a_step(model: Decoder, experts: list[int], batch: int, length: int) -> int:
    """What one step must read: `experts` counts the distinct ones of each MoE layer."""
    config = model.config
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    if not config.tie_embeddings:
        total -= model.embed[...].nbytes  # a row a token, not the table
    moe_layers = [layer.ffn for layer in model.layers if isinstance(layer.ffn, MoE)]
    for ffn, count in zip(moe_layers, experts, strict=True):
        stacked = ffn.gate_up[...].nbytes + ffn.down[...].nbytes
        total -= stacked - stacked // ffn.down[...].shape[0] * count
    mla = config.mla
    latent = (mla.kv_lora_rank + mla.qk_rope_head_dim) * jnp.dtype(config.dtype).itemsize
    row = length * latent
    if mla.index_n_heads:  # every key of the indexer, with its scale, and the latents it chose
        row = length * (mla.index_head_dim + 4) + min(length, mla.index_topk) * latent
    return total + batch * row * config.n_layers


def bench_step(model: Decoder, batch: int, length: int, ceiling: float, seed: int = 0) -> Row:
    """Greedy decode from `length` cached tokens a row, in the blocks that `generate` runs."""
    config = model.config
    per_row = -(-(length + 2 * BLOCK_STEPS) // PAGE)
    allocator = PageAllocator(batch * per_row, page_size=PAGE)
    table = allocator.table([allocator.allocate(per_row * PAGE) for _ in range(batch)])
    cache = PagedLatentCache.create(
        config, num_pages=batch * per_row, max_batch=batch, max_pages=per_row
    )
    # Zeros would make every score equal; what a model caches has about unit variance.
    keys = iter(jax.random.split(jax.random.key(seed), 3 * config.n_layers))
    cache = dataclasses.replace(
        cache,
        ckv=tuple(jax.random.normal(next(keys), p.shape, p.dtype) for p in cache.ckv),
        kpe=tuple(jax.random.normal(next(keys), p.shape, p.dtype) for p in cache.kpe),
        index_keys=tuple(
            QuantizedPool(
                jax.random.normal(next(keys), p.shape).astype(p.dtype), jnp.ones_like(p.scales)
            )
            for p in cache.index_keys
        ),
    )
    lengths = jnp.full(batch, length, jnp.int32)
    cache = cache.with_rows(jnp.asarray(table), lengths)
    tokens = jax.random.randint(jax.random.key(seed), (batch,), 0, config.vocab, jnp.int32)
    chosen = jax.jit(experts_chosen)(model, tokens, cache)
    experts = [len(np.unique(ids)) for ids in jax.device_get(chosen)]

    key = jax.random.key(seed)
    before = compilations(decode_block)

    def block(cache: PagedLatentCache) -> PagedLatentCache:
        return decode_block(model, tokens, cache, key, sampler=Sampler())[1]

    state = [cache]

    def run() -> jax.Array:
        # Every block starts at the same lengths, in the pools that the last one donated back.
        state[0] = block(state[0].with_rows(state[0].block_table, lengths + 0))
        return state[0].lengths

    seconds = seconds_a_run(run, burst=2) / BLOCK_STEPS
    moved = bytes_a_step(model, experts, batch, length + BLOCK_STEPS // 2)
    floor = moved / ceiling / 1e9
    return {
        "op": "decode_step",
        "shape": f"B{batch} s{length}",
        "dtype": config.dtype,
        "ms_a_step": seconds * 1e3,
        "tokens_s": batch / seconds,
        "floor_ms": floor * 1e3,
        "times_floor": seconds / floor,
        "gigabytes_a_step": moved / 1e9,
        "experts_a_layer": float(np.mean(experts)) if experts else 0.0,
        "compilations": compilations(decode_block) - before,
    }


def run(
    config: ModelConfig, batches: list[int], length: int, bandwidth: float
) -> list[Iterator[Row]]:
    """Kernels first, then whole steps of a model with random weights.

    bandwidth: GB/s, of the same run. Every iterator measures when it is asked for a row.
    """
    heads = config.mla.n_heads

    def kernels(batch: int) -> Iterator[Row]:
        yield bench_attention(batch, heads, length, bandwidth)
        if config.moe is not None:
            yield bench_experts(config, batch, bandwidth)

    def steps() -> Iterator[Row]:
        model = Decoder(config, rngs=nnx.Rngs(0))
        for batch in batches:
            yield bench_step(model, batch, length, bandwidth)

    def yardstick() -> Iterator[Row]:
        yield bench_attention(128, 16, 4096, bandwidth)

    return [yardstick(), *map(kernels, batches), steps()]
