"""The mesh's axes, and which models fit a mesh."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from mla_jax.config import MLAConfig, ModelConfig

Device: TypeAlias = Any
"""A jax.Device, which type checkers take for a variable."""

DATA_AXIS = "data"
"""Requests are split over it, each part with page pools of its own."""
CONTEXT_AXIS = "context"
"""The pages of a request are spread over it."""
MODEL_AXIS = "model"
"""Heads, hidden features, experts and the vocabulary are split over it."""


def make_mesh(
    *,
    data: int = 1,
    model: int = 1,
    context: int = 1,
    devices: Sequence[Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh of data * context * model devices, those of one `model` group next to each other.

    data: groups of requests; model: parts of the weights; context: parts of every request's cache.
    devices: None takes the first of `jax.devices()`, all processes' in order. axis_type: Auto or
    Explicit, both work. Pass the mesh to `shard_model`, `load_checkpoint`, `generate` or
    `PagedLatentCache.create`; `jax.set_mesh(mesh)` runs `prefill` and `decode_step` on it.
    Errors: ValueError for a size below 1, or more than there are devices.

    >>> make_mesh(model=1).axis_names
    ('data', 'context', 'model')
    """
    sizes = {DATA_AXIS: data, CONTEXT_AXIS: context, MODEL_AXIS: model}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    devices = jax.devices() if devices is None else list(devices)
    wanted = data * context * model
    if wanted > len(devices):
        raise ValueError(
            f"make_mesh: got {data=} * {context=} * {model=}, expected at most the "
            f"{len(devices)} devices there are"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(axis_type,) * len(sizes),
        devices=devices[:wanted],
    )


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """How many parts `axis` makes: 1 if the mesh has no such axis."""
    return mesh.shape.get(axis, 1)


def check_mesh(config: ModelConfig | MLAConfig, mesh: Mesh | AbstractMesh) -> None:
    """ValueError unless everything that `mesh` splits over its model axis has that many parts.

    An indexer is whole on every device and chooses among all of a row's tokens, so with one the
    context axis must be 1.

    >>> from mla_jax import presets
    >>> check_mesh(presets["deepseek-v3"], make_mesh())
    """
    mla = config if isinstance(config, MLAConfig) else config.mla
    context = axis_size(mesh, CONTEXT_AXIS)
    if mla.index_n_heads and context > 1:
        raise ValueError(f"mesh: got {context=}, expected 1 for a model with an indexer")
    split = {"n_heads": mla.n_heads}
    if isinstance(config, ModelConfig):
        moe = config.moe
        if not config.tie_embeddings:
            split["vocab"] = config.vocab
        if moe is None or config.n_dense:
            split["inter_dim"] = config.inter_dim
        if moe is not None:
            split["moe.n_routed"] = moe.n_routed
            split["moe.n_shared * moe.inter_dim"] = moe.n_shared * moe.inter_dim
    parts = axis_size(mesh, MODEL_AXIS)
    for name, size in split.items():
        if size % parts:
            raise ValueError(f"mesh: got {MODEL_AXIS}={parts}, expected a divisor of {name}={size}")
