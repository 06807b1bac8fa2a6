"""Models, caches and meshes for the tests of sharding, on eight CPU devices."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from mla_jax import Decoder, PagedLatentCache, presets
from mla_jax.sharding import make_mesh

TINY = presets["tiny"]
assert TINY.moe is not None
# A dense layer and one with as many experts as there are devices.
CONFIG = dataclasses.replace(
    TINY, n_layers=2, eos_ids=(), moe=dataclasses.replace(TINY.moe, n_routed=8, n_active=3)
)
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
