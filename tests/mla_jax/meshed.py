"""Models, caches and meshes for the tests of sharding, on eight CPU devices."""

import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from oracles import QUICK_COMPILE, float64

from mla_jax import Decoder, PagedLatentCache, decode_step, prefill, presets
from mla_jax.sharding import make_mesh, shard_model

TINY = presets["tiny"]
assert TINY.moe is not None
# A dense layer and one with as many experts as there are devices.
CONFIG = dataclasses.replace(
    TINY, n_layers=2, eos_ids=(), moe=dataclasses.replace(TINY.moe, n_routed=8, n_active=3)
)
# Every expert has a say: a choice between two that are nearly tied would be no rounding error.
ALL_CHOSEN = dataclasses.replace(CONFIG, moe=dataclasses.replace(TINY.moe, n_routed=8, n_active=8))
# Of a row's logits in bfloat16, as a share of their length; test_sharding_bfloat16 has the reason.
UNITS, UNIT = {"mean": 5, "max": 9}, 2**-8
AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
SHAPES = [
    {"data": data, "model": model, "context": 8 // data // model}
    for data in (1, 2, 4, 8)
    for model in (1, 2, 4, 8)
    if data * model <= 8
]
PAGE, BATCH, MAX_PAGES, NUM_PAGES = 4, 8, 8, 64


def label(value: object) -> str:
    """A mesh's shape or axis type in the name of a test."""
    if isinstance(value, dict):
        return "-".join(f"{axis}{size}" for axis, size in value.items() if size > 1) or "single"
    return str(value)


@functools.cache
def model(seed: int) -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(seed))


def cache_on(mesh: Mesh | None, rng: np.random.Generator) -> PagedLatentCache:
    """An empty cache whose rows own random pages of their own group's, NaN in all of them."""
    cache = PagedLatentCache.create(
        CONFIG,
        num_pages=NUM_PAGES,
        page_size=PAGE,
        max_batch=BATCH,
        max_pages=MAX_PAGES,
        mesh=mesh,
    )
    groups = 1 if mesh is None else mesh.shape["data"]
    table = np.concatenate(
        [
            rng.permutation(NUM_PAGES // groups).reshape(BATCH // groups, MAX_PAGES)
            for _ in range(groups)
        ]
    ).astype(np.int32)
    place = None if mesh is None else cache.block_table.sharding
    poisoned = jax.tree.map(lambda x: x + jnp.nan if x.dtype == jnp.float32 else x, cache)
    return poisoned.with_rows(jax.device_put(table, place), cache.lengths)


def collectives(program: str | None) -> dict[str, int]:
    """How many of each kind of message a compiled program sends."""
    assert program is not None
    kinds = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|send|recv)"
    found = re.findall(rf" {kinds}(?:-start)?\(", program)
    return dict(collections.Counter(found))


def mesh_of(shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    data, model, context = (shape.get(axis, 1) for axis in ("data", "model", "context"))
    return make_mesh(data=data, model=model, context=context, axis_type=axis_type)


def logits_on(
    mesh: Mesh | None,
    model: Decoder,
    tokens: np.ndarray,
    *,
    prompt: int,
    page: int = PAGE,
    step_backend: str | None = None,
    **kernel,
) -> np.ndarray:
    """After tokens[:, :prompt] and after each step: [1 + steps, batch, vocab] in float64.

    kernel: options of both functions; step_backend: the steps' own. The caches are donated, and
    appended to in place.
    """
    batch, total = tokens.shape
    per_row = -(-total // page)
    # As many pages as any of these meshes divides.
    num_pages = batch * per_row * 8
    cache = PagedLatentCache.create(
        model.config,
        num_pages=num_pages,
        page_size=page,
        max_batch=batch,
        max_pages=per_row,
        mesh=mesh,
    )
    groups = 1 if mesh is None else mesh.shape["data"]
    table = np.arange(batch * per_row, dtype=np.int32).reshape(batch, per_row)
    table %= per_row * (batch // groups)
    place = None if mesh is None else cache.lengths.sharding
    cache = cache.with_rows(jax.device_put(table, place), cache.lengths)
    fill, step = (
        jax.jit(
            functools.partial(function, **options),
            donate_argnums=2,
            compiler_options=QUICK_COMPILE if jax.default_backend() == "cpu" else None,
        )
        for function, options in (
            (prefill, kernel),
            (decode_step, kernel | ({"backend": step_backend} if step_backend else {})),
        )
    )
    if mesh is not None:
        model = shard_model(model, mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        logits, cache = fill(model, jax.device_put(tokens[:, :prompt], place), cache)
        found = [float64(logits)]
        for token in tokens[:, prompt:].T:
            before = cache
            logits, cache = step(model, jax.device_put(token, place), before)
            assert all(pool.is_deleted() for pool in (*before.ckv, *before.kpe))
            found.append(float64(logits))
    return np.stack(found)


def units(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Each row's distance as a share of its length."""
    return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1) / UNIT
