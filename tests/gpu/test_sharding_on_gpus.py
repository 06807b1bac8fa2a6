"""Meshes of two or more GPUs of this machine: one device's logits, and what is sent is right.

Without GPUs the same runs on eight CPU devices, where Triton's kernels are interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshed import ALL_CHOSEN, UNITS, label, logits_on, mesh_of, units
from on_gpu import needs_hopper
from oracles import float64

from mla_jax import Decoder, PagedLatentCache, decode_step, generate, presets
from mla_jax.bench import link, sharded, timing
from mla_jax.bench import sharded_programs as programs
from mla_jax.bench.meshed import compile_all
from mla_jax.sharding import shard_model

pytestmark = pytest.mark.skipif(
    jax.device_count() < 2, reason=f"needs two devices; this run has {jax.device_count()}"
)

ON_GPU = jax.default_backend() == "gpu"
DEVICES = 1 << (min(8, jax.device_count()).bit_length() - 1)
SHAPES = [{"model": DEVICES}, {"data": DEVICES}, {"context": DEVICES}]
if DEVICES > 2:
    SHAPES += [{"data": 2, "model": DEVICES // 2}, {"context": 2, "model": DEVICES // 2}]
PAGE, BATCH = 16, 16
# Widths that every kernel has, and batches that each mesh divides.
WIDE = dataclasses.replace(
    ALL_CHOSEN,
    mla=dataclasses.replace(ALL_CHOSEN.mla, kv_lora_rank=128, qk_rope_head_dim=64),
)
# Float32 sums in another order, of logits of about unit size.
ATOL = 2e-4


@functools.cache
def case(seed: int, dtype: str, length: int, moe: bool = True) -> tuple[Decoder, np.ndarray]:
    """A model, and a text of BATCH rows."""
    config = WIDE if moe else dataclasses.replace(WIDE, moe=None)
    tokens = np.random.default_rng(seed).integers(0, WIDE.vocab, (BATCH, length), np.int32)
    return Decoder(config.replace_dtype(dtype), rngs=nnx.Rngs(seed)), tokens


@functools.cache
def alone(seed: int, dtype: str, length: int, moe: bool = True, **options) -> np.ndarray:
    """One device's logits: the same for every mesh."""
    return logits_on(None, *case(seed, dtype, length, moe), prompt=length - 3, page=PAGE, **options)


def check(shape, seed, dtype, length, moe=True, *, beside=None, **options) -> None:
    """A mesh's logits beside one device's, with the same options or `beside`'s."""
    want = alone(seed, dtype, length, moe, **(options if beside is None else beside))
    model, tokens = case(seed, dtype, length, moe)
    got = logits_on(mesh_of(shape), model, tokens, prompt=length - 3, page=PAGE, **options)
    if dtype == "float32":
        np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)
    else:
        distance = units(got, want)
        assert distance.mean() < UNITS["mean"]
        assert distance.max() < UNITS["max"]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [None, "triton", "reference"])
def test_prefill_and_steps(seed, backend, dtype, shape):
    """A prompt that attends in the latent space, then steps."""
    check(shape, seed, dtype, 40, backend=backend, interpret=not ON_GPU and backend == "triton")


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompts(seed, dtype, shape):
    """Enough queries for full keys and values, whichever backend is the fastest for them."""
    assert case(seed, dtype, 300)[0].layers[0].attn.expands(297)
    check(shape, seed, dtype, 300)


@needs_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_mosaic_gpu(seed, shape):
    """Named for the steps; of a model without experts, which it has no kernel for."""
    beside = {"step_backend": "reference"}
    check(shape, seed, "bfloat16", 40, False, beside=beside, step_backend="mosaic_gpu")


def sizes_of(axis: str) -> tuple:
    """DeepSeek-V3's on GPUs, small ones elsewhere: (config, batch, length, context's length)."""
    if ON_GPU:
        sizes = sharded.Sizes()
        return sizes.layer, sizes.batch, sizes.length, sizes.contexts[0] + 77
    return dataclasses.replace(sharded.Sizes().layer, dim=64, n_heads=8, q_lora_rank=32), 2, 70, 777


@pytest.mark.parametrize("part", ["kernel", "layer", "context"])
def test_what_the_benchmark_times(monkeypatch, part):
    """DeepSeek-V3's attention over all devices is that of one: results of one call each."""
    monkeypatch.setattr(timing, "CALLS", 1)
    axis = "context" if part == "context" else "model"
    config, batch, length, long = sizes_of(axis)
    meshes = [sharded.first_devices(count, axis) for count in (1, DEVICES)]
    if part == "kernel":
        made = [programs.attention_by_heads(m, config.n_heads, batch, length) for m in meshes]
        fill, length = programs.kernel_runs, length
    elif part == "layer":
        made = [programs.layer_by_heads(m, config, batch, length) for m in meshes]
        fill, length = programs.layer_runs, length
    else:
        made = [programs.attention_by_context(m, config, long) for m in meshes]
        fill, length = programs.context_runs, long
    results = []
    for program, run in zip(made, compile_all(made), strict=True):
        runs = fill(program, run, length)
        runs.burst(1)
        # The kernel's own result; of the others what they added to their input.
        added = 0 if part == "kernel" else float64(runs.x)
        results.append(float64(runs.result) - added)
    want, got = results
    # What is added is rounded with what it is added to, of less than 2: half a unit there.
    rounding = 0 if part == "kernel" else 2**-8
    assert np.abs(got - want).max() < rounding + 2**-6 * np.abs(want).max()
    assert np.linalg.norm(want) > 0


def test_the_cache_stays_where_it_is(seed):
    """Donated: every device appends to its own pools, and nothing else is written to memory."""
    mesh = mesh_of(SHAPES[-1])
    model = shard_model(Decoder(WIDE, rngs=nnx.Rngs(seed)), mesh)
    cache = PagedLatentCache.create(
        WIDE, num_pages=4 * BATCH, page_size=PAGE, max_batch=BATCH, max_pages=4, mesh=mesh
    )
    groups = mesh.shape["data"]
    table = np.arange(4 * BATCH, dtype=np.int32).reshape(BATCH, 4) % (4 * BATCH // groups)
    place = cache.lengths.sharding
    cache = cache.with_rows(jax.device_put(table, place), cache.lengths)

    def addresses(cache: PagedLatentCache) -> list[int]:
        return [
            part.data.unsafe_buffer_pointer()
            for pool in jax.tree.leaves((cache.ckv, cache.kpe))
            for part in pool.addressable_shards
        ]

    tokens = jax.device_put(np.zeros(BATCH, np.int32), place)
    step = jax.jit(decode_step, donate_argnums=2)
    with jax.set_mesh(mesh):
        _, cache = step(model, tokens, cache)
        before = addresses(cache)
        for _ in range(3):
            _, cache = step(model, tokens, cache)
    assert addresses(cache) == before
    assert (np.asarray(cache.lengths) == 4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_greedy_tokens(seed, rng, shape):
    model = Decoder(dataclasses.replace(presets["tiny"], eos_ids=()), rngs=nnx.Rngs(seed))
    if shape.get("model", 1) > 4:
        pytest.skip("the tiny model has four experts")
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 40, 200)]
    want = generate(model, prompts, max_new_tokens=40, page_size=16)
    assert generate(model, prompts, max_new_tokens=40, page_size=16, mesh=mesh_of(shape)) == want


def test_sums_over_devices():
    """Small numbers, which bfloat16 adds exactly; and every message is really sent."""
    mesh = sharded.first_devices(DEVICES)
    for rows in (1, 128):
        program = link.sums(mesh, rows, 64)
        run = program.compile()
        assert link.messages_in(run.as_text()) >= timing.CALLS
        x, _, share = program.args
        values = np.arange(DEVICES * rows * 64).reshape(DEVICES, rows, 64) % 7
        given = jnp.asarray(values.reshape(-1, 64), jnp.bfloat16)
        shares = jnp.full(DEVICES, 1 / DEVICES, jnp.bfloat16)
        result, _ = run(
            *(jax.device_put(given, x.sharding), ()), jax.device_put(shares, share.sharding)
        )
        # The first sum, then means of equal numbers.
        want = np.broadcast_to(values.sum(axis=0) / DEVICES, values.shape)
        np.testing.assert_array_equal(float64(result).reshape(values.shape), want)
