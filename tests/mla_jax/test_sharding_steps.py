"""Prefill and decode on every shape of mesh: the whole-sequence model's logits, and no more
messages than the layout needs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import MOSAIC_GPU
from jax.sharding import AxisType
from meshed import (
    AXIS_TYPES,
    BATCH,
    CONFIG,
    PAGE,
    SHAPES,
    cache_on,
    collectives,
    label,
    mesh_of,
    model,
)
from oracles import QUICK_COMPILE

from mla_jax import PagedLatentCache, decode_step, prefill
from mla_jax.sharding import shard_model

LAYERS = CONFIG.n_layers
CHUNK = 11


def counts(rng: np.random.Generator, chunk: int) -> np.ndarray:
    """Of a row: nothing, one token, a whole page, a whole chunk, or anything in between."""
    drawn = rng.integers(0, chunk + 1, BATCH)
    drawn[:4] = (0, 1, PAGE, chunk)
    return rng.permutation(drawn).astype(np.int32)


@functools.cache
def whole_logits(seed: int):
    """The model without a cache, on one device: [batch, tokens, vocab]."""
    whole = model(seed)
    return jax.jit(lambda tokens: whole(tokens), compiler_options=QUICK_COMPILE)


def run_loop(seed, rng, mesh, sharded=None, steps=3, **kernel):
    """Two ragged chunks and some steps on `mesh`, each checked against the whole-sequence model.

    Returns the two compiled programs, which take no other layout than the one that they were made
    for, and the last cache.
    """
    first, second = counts(rng, CHUNK), counts(rng, CHUNK)
    total = 2 * CHUNK + steps
    tokens = rng.integers(0, CONFIG.vocab, (BATCH, total)).astype(np.int32)
    want = np.asarray(whole_logits(seed)(tokens))
    rows, lengths = np.arange(BATCH), np.zeros(BATCH, np.int32)
    cache = cache_on(mesh, rng)
    if sharded is None:
        sharded = model(seed) if mesh is None else shard_model(model(seed), mesh)

    def compiled(function, *args):
        jitted = jax.jit(
            functools.partial(function, **kernel),
            donate_argnums=2,
            compiler_options=QUICK_COMPILE,
        )
        return jitted.lower(*args).compile()

    def put(array):
        return jax.device_put(array, None if mesh is None else cache.lengths.sharding)

    def fill_rows(model, tokens, cache, counts, **kernel):
        return prefill(model, tokens, cache, counts=counts, **kernel)

    fill = step = None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for count in (first, second):
            chunk = tokens[rows[:, None], lengths[:, None] + np.arange(CHUNK)]
            args = (sharded, put(chunk), cache, put(count))
            fill = fill or compiled(fill_rows, *args)
            logits, cache = fill(*args)
            lengths += count
            filled = count > 0
            np.testing.assert_allclose(
                np.asarray(logits)[filled], want[rows, lengths - 1][filled], rtol=0, atol=3e-5
            )
        for _ in range(steps):
            args = (sharded, put(tokens[rows, lengths]), cache)
            step = step or compiled(decode_step, *args)
            logits, cache = step(*args)
            np.testing.assert_allclose(logits, want[rows, lengths], rtol=0, atol=3e-5)
            lengths += 1
    np.testing.assert_array_equal(cache.lengths, lengths)
    assert fill is not None
    assert step is not None
    return fill, step, cache


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=label)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_equals_the_model_on_one_device(seed, rng, shape, axis_type):
    mesh = mesh_of(shape, axis_type)
    *programs, cache = run_loop(seed, rng, mesh)
    # Every device has its own part of the pools and no more, before and after.
    places = jax.tree.map(lambda x: x.sharding, cache_on(mesh, rng))
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), cache, places)
    assert all(jax.tree.leaves(same))
    parts = shape["data"] * shape["context"]
    assert {part.data.shape[0] for part in cache.ckv[0].addressable_shards} == {64 // parts}

    # After attention and after the feed-forward over `model`, in attention over `context`.
    expected = {}
    if shape["model"] > 1:
        expected["all-reduce"] = 2 * LAYERS
    if shape["context"] > 1:
        expected["all-gather"] = LAYERS
    pools = sum(pool.addressable_shards[0].data.nbytes for pool in (*cache.ckv, *cache.kpe))
    for program in programs:
        assert collectives(program.as_text()) == expected
        # Donated: appended in place, not copied.
        memory = program.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= pools


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=label)
def test_one_program_serves_the_loop(seed, rng, axis_type):
    mesh = mesh_of({"data": 2, "model": 2, "context": 2}, axis_type)
    sharded, cache = shard_model(model(seed), mesh), cache_on(mesh, rng)
    traced = []

    def step(model, tokens, cache):
        traced.append(1)
        logits, cache = decode_step(model, tokens, cache)
        return logits.argmax(axis=-1).astype(jnp.int32), cache

    step = jax.jit(step, donate_argnums=2, compiler_options=QUICK_COMPILE)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(np.zeros(BATCH, np.int32), cache.lengths.sharding)
        tokens, cache = step(sharded, tokens, cache)
        tokens, cache = step(sharded, tokens, cache)
        lowered = step.lower(sharded, tokens, cache)
        compiled = lowered.compile()
        for _ in range(2 * PAGE):
            # A compiled program takes no other layout than the one that it was made for.
            tokens, cache = compiled(sharded, tokens, cache)
    assert len(traced) == 1
    assert (np.asarray(cache.lengths) == 2 + 2 * PAGE).all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "shape", [{"data": 2, "model": 4}, {"model": 2, "context": 2}, {"model": 8}], ids=label
)
def test_every_backend(seed, rng, shape, backend):
    run_loop(seed, rng, mesh_of(shape), steps=2, backend=backend, interpret=True)


@pytest.mark.skipif(not MOSAIC_GPU, reason="needs the interpreter of jax 0.11")
def test_axes_named_as_a_kernels_own(seed, rng):
    """A mesh may have axes of any further names, the kernels' own included."""
    from pallas_kernels.paged_attention.mosaic_block import CLUSTER, GRID, THREAD

    for others in ((GRID, CLUSTER), (THREAD, "i")):
        names = ("data", "model", *others)
        mesh = jax.make_mesh((2, 2, 2, 1), names, axis_types=(AxisType.Auto,) * 4)
        run_loop(seed, rng, mesh, steps=2, backend="triton", interpret=True)


def test_without_a_mesh_nothing_is_sent(seed, rng):
    _, step, _ = run_loop(seed, rng, None)
    program = step.as_text()
    assert program is not None
    assert collectives(program) == {}
    assert "sharding=" not in program


def test_a_model_that_is_not_on_the_mesh_is_put_there(seed, rng):
    """Slow, but right: jit moves what lies elsewhere."""
    for axis_type in AXIS_TYPES:
        mesh = mesh_of({"data": 2, "model": 4}, axis_type)
        run_loop(seed, rng, mesh, sharded=model(seed), steps=1)


def test_what_a_mesh_does_not_divide(seed, rng):
    mesh = mesh_of({"data": 2, "context": 2})
    sizes = {"num_pages": 8, "max_batch": 4, "max_pages": 2}

    def create(**changed):
        return PagedLatentCache.create(CONFIG, **{**sizes, **changed})

    with pytest.raises(ValueError, match=r"^max_batch: got 5, expected a multiple of .*data=2$"):
        create(max_batch=5, mesh=mesh)
    with pytest.raises(ValueError, match=r"^num_pages: got 6, .*data=2 \* context=2$"):
        create(num_pages=6, mesh=mesh)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"^num_pages: got 6"):
            decode_step(model(seed), jnp.zeros(4, jnp.int32), create(num_pages=6))
        with pytest.raises(NotImplementedError, match=r"^copy_pages: the pools are split over"):
            create(mesh=mesh).copy_pages(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))
    with (
        jax.set_mesh(mesh_of({"model": 3})),
        pytest.raises(ValueError, match=r"^mesh: got model=3, expected a divisor of n_heads=8$"),
    ):
        decode_step(model(seed), jnp.zeros(4, jnp.int32), create())
