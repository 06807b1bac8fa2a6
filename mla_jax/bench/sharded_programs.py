"""What `bench sharded` times: programs for a mesh from shapes alone, and the arrays they run on.

The meshes may be abstract, so that the programs can be lowered for devices that are not there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from mla_jax.bench import timing
from mla_jax.bench.decode_step import PAGE, random_pages
from mla_jax.bench.link import DTYPE
from mla_jax.bench.meshed import (
    AnyMesh,
    Program,
    Runs,
    on_parts,
    random_arrays,
    random_weights,
    struct,
)
from mla_jax.bench.paged import LATENT, ROPE
from mla_jax.cache import PagedLatentCache
from mla_jax.config import MLAConfig, ModelConfig
from mla_jax.generate import BLOCK_STEPS, decode_block
from mla_jax.nn import MLA, Decoder
from mla_jax.paged import DEFAULT_SM_SCALE
from mla_jax.rope import rotation
from mla_jax.sampling import Sampler
from mla_jax.sharding.collectives import merge_over_context
from mla_jax.sharding.layout import parameter_spec
from mla_jax.sharding.mesh import CONTEXT_AXIS, MODEL_AXIS, axis_size
from pallas_kernels.paged_decode import paged_decode

WIDTHS = (LATENT, ROPE)


def module_structs(make: Callable[[], Any], mesh: AnyMesh) -> Any:
    """A module whose arrays are structs, with the places on `mesh` that its parameters ask for."""
    module = nnx.eval_shape(make)
    leaves, tree = jax.tree.flatten(module)
    variables = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
    structs = [
        struct(mesh, leaf.shape, leaf.dtype, *parameter_spec(variable, mesh))
        for leaf, variable in zip(leaves, variables, strict=True)
    ]
    return jax.tree.unflatten(tree, structs)


def pool_structs(mesh: AnyMesh, tokens: int) -> tuple[Any, Any]:
    """One layer's pools for so many tokens, spread evenly over the mesh's context devices."""
    context = axis_size(mesh, CONTEXT_AXIS)
    pages = -(-tokens // PAGE // context) * context
    ckv, kpe = (struct(mesh, (pages, PAGE, width), DTYPE, CONTEXT_AXIS) for width in WIDTHS)
    return ckv, kpe


def attention_by_heads(mesh: AnyMesh, heads: int, batch: int, length: int) -> Program:
    """CALLS calls of the decode kernel, each device with its share of the heads."""

    def call(q_nope: Array, q_pe: Array, ckv: Array, kpe: Array, *pages: Array) -> Array:
        return paged_decode(q_nope, q_pe, ckv, kpe, *pages, sm_scale=DEFAULT_SM_SCALE)[0]

    def part(x: Array, state: tuple[()], rest: tuple[Array, ...]):
        return timing.chained(call, timing.CALLS)(x, *rest), state

    queries = [struct(mesh, (batch, 1, heads, w), DTYPE, None, None, MODEL_AXIS) for w in WIDTHS]
    ids = [struct(mesh, (size,), jnp.int32) for size in (batch * -(-length // PAGE), batch, batch)]
    rest = (queries[1], *pool_structs(mesh, batch * length), *ids)
    args = (queries[0], (), rest)
    return Program(mesh=mesh, function=on_parts(part, *args), args=args)


def layer_by_heads(mesh: AnyMesh, config: MLAConfig, batch: int, length: int) -> Program:
    """CALLS layers of latent attention, x + layer(x), that append a token and attend to `length`.

    All have the same weights and pools, which no cache of a GPU holds.
    """
    module = module_structs(lambda: MLA(config, rngs=nnx.Rngs(0)), mesh)
    weights, tree = jax.tree.flatten(module)

    def part(x: Array, pools: tuple[Array, Array], rest: tuple[list[Array], Array, Array]):
        weights, table, lengths = rest
        layer, (ckv, kpe) = jax.tree.unflatten(tree, weights), pools
        view = one_layer(ckv, kpe, table, lengths).view(1, jnp.ones_like(lengths))
        rope = rotation(config, view.positions)
        for _ in range(timing.CALLS):
            out, ckv, kpe = layer.paged(x, ckv, kpe, view, rope)
            x = x + out
        return x, (ckv, kpe)

    x = struct(mesh, (batch, 1, config.dim), DTYPE)
    table = struct(mesh, (batch, -(-length // PAGE)), jnp.int32)
    rest = (weights, table, struct(mesh, (batch,), jnp.int32))
    args = (x, pool_structs(mesh, batch * length), rest)
    return Program(mesh=mesh, function=on_parts(part, *args), args=args)


def attention_by_context(mesh: AnyMesh, config: MLAConfig, length: int) -> Program:
    """CALLS times one request's attention, from queries [1, 1, H, N] to values of the same shape.

    The layer without its projections, each device over its own pages, then merged.
    """
    module = module_structs(lambda: MLA(config, rngs=nnx.Rngs(0)), mesh)
    weights, tree = jax.tree.flatten(module)

    def part(x: Array, state: tuple[()], rest: tuple[Any, ...]):
        weights, q_pe, (ckv, kpe), table, lengths = rest
        layer = jax.tree.unflatten(tree, weights)
        view = one_layer(ckv, kpe, table, lengths).view(1, jnp.ones_like(lengths))
        pages = (ckv, kpe, view.page_ids, view.start, view.held(view.length, PAGE))
        for _ in range(timing.CALLS):
            query = layer.absorb_query(x)
            out, lse = paged_decode(query, q_pe, *pages, sm_scale=config.softmax_scale)
            x = x + merge_over_context(layer.expand_values(out), lse)
        return x, state

    x = struct(mesh, (1, 1, config.n_heads, config.qk_nope_head_dim), DTYPE)
    q_pe = struct(mesh, (1, 1, config.n_heads, ROPE), DTYPE)
    table = struct(mesh, (1, -(-length // PAGE)), jnp.int32)
    pools, lengths = pool_structs(mesh, length), struct(mesh, (1,), jnp.int32)
    args = (x, (), (weights, q_pe, pools, table, lengths))
    return Program(mesh=mesh, function=on_parts(part, *args), args=args)


def block_of_steps(mesh: AnyMesh, config: ModelConfig, batch: int, length: int) -> Program:
    """A block of greedy decode steps, as `generate` runs them, after `length` tokens a row."""
    model = module_structs(lambda: Decoder(config, rngs=nnx.Rngs(0)), mesh)
    per_row = -(-(length + BLOCK_STEPS) // PAGE)
    sizes: dict[str, Any] = {"num_pages": batch * per_row, "max_batch": batch, "max_pages": per_row}
    cache = jax.eval_shape(lambda: PagedLatentCache.create(config, **sizes))
    cache = jax.tree.map(
        lambda array, place: struct(mesh, array.shape, array.dtype, *place),
        *(cache, cache.specs(mesh)),
    )

    def block(tokens: Array, cache: PagedLatentCache, rest: tuple[Decoder, Array]):
        model, lengths = rest
        cache = cache.with_rows(cache.block_table, lengths)
        return decode_block(model, tokens, cache, jax.random.key(0), sampler=Sampler())

    row = struct(mesh, (batch,), jnp.int32)
    return Program(mesh=mesh, function=block, args=(row, cache, (model, row)))


def one_layer(ckv: Array, kpe: Array, table: Array, lengths: Array) -> PagedLatentCache:
    return PagedLatentCache(ckv=(ckv,), kpe=(kpe,), block_table=table, lengths=lengths)


def put(values: Any, like: jax.ShapeDtypeStruct) -> Array:
    """A few integers of the host's, where `like` will be."""
    return jax.device_put(np.broadcast_to(np.int32(values), like.shape), like.sharding)


def ids_on(mesh: AnyMesh, places: np.ndarray, pages: int) -> np.ndarray:
    """The ids of what lies at `places` of a pool of `pages`: id i is on device i % context."""
    context = axis_size(mesh, CONTEXT_AXIS)
    own = pages // context
    return places % own * context + places // own


def kernel_runs(program: Program, run: Callable[..., Any], length: int) -> Runs:
    x, state, (q_pe, ckv, kpe, ids, start, lengths) = program.args
    table, _ = random_pages(x.shape[0], length, 0)
    starts = np.arange(x.shape[0]) * table.shape[1]
    pages = (put(table.reshape(-1), ids), put(starts, start), put(length, lengths))
    q_nope, *floats = random_arrays((x, q_pe, ckv, kpe), 0)
    return Runs(run, q_nope, state, (*floats, *pages))


def layer_runs(program: Program, run: Callable[..., Any], length: int) -> Runs:
    x, pools, (weights, table, lengths) = program.args
    places, _ = random_pages(x.shape[0], length, 0)
    rest = (random_weights(weights, 1), put(places, table), put(length - 1, lengths))
    hidden, pools = random_arrays((x, pools), 0)
    return Runs(run, hidden, pools, rest)


def context_runs(program: Program, run: Callable[..., Any], length: int) -> Runs:
    x, state, (weights, q_pe, pools, table, lengths) = program.args
    places, _ = random_pages(1, length, 0)
    query, q_pe, pools = random_arrays((x, q_pe, pools), 0)
    # The view counts a new token: here it is one that is there already.
    tables = put(ids_on(program.mesh, places, pools[0].shape[0]), table), put(length - 1, lengths)
    return Runs(run, query, state, (random_weights(weights, 1), q_pe, pools, *tables))


def step_runs(program: Program, run: Callable[..., Any], model: Decoder, length: int) -> Runs:
    tokens, cache, (_, lengths) = program.args
    batch, per_row = cache.block_table.shape
    ckv, kpe = random_arrays((cache.ckv, cache.kpe), 0)
    table, _ = random_pages(batch, per_row * PAGE, 0)
    whole = dataclasses.replace(cache, ckv=ckv, kpe=kpe)
    whole = whole.with_rows(put(table, cache.block_table), put(0, cache.lengths))
    first = np.random.default_rng(0).integers(0, model.config.vocab, batch)
    return Runs(run, put(first, tokens), whole, (model, put(length, lengths)))
