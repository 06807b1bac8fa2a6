"""Where weights, caches and requests lie on a mesh, and a step that runs on each device's part."""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mla_jax.config import ModelConfig
from mla_jax.sharding.mesh import CONTEXT_AXIS, DATA_AXIS, MODEL_AXIS, axis_size, check_mesh
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.precision import GROUP

if TYPE_CHECKING:
    from mla_jax.cache import PagedLatentCache
    from mla_jax.nn import MLA, Decoder

Model = TypeVar("Model", bound="Decoder | MLA")
AnyMesh = Mesh | AbstractMesh


def spec(mesh: AnyMesh, *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """A PartitionSpec in one form: no axis that splits nothing, no None at the end.

    Arrays whose specs only mean the same would make jit compile again.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        names = (axis,) if isinstance(axis, str) else axis or ()
        split = tuple(name for name in names if axis_size(mesh, name) > 1)
        entries.append(split if len(split) > 1 else split[0] if split else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def parameter_spec(parameter: nnx.Variable, mesh: AnyMesh) -> PartitionSpec:
    """The layout that a module gave its parameter; replicated if it gave none.

    That of both values and scales, if it has them. Errors: ValueError if it would cut their blocks.
    """
    axes = parameter.get_metadata().get("out_sharding") or ()
    if isinstance(weight := parameter.get_value(), BlockScaled):
        rows, columns = weight.block_size
        # Columns are those of the activations too, whose groups should be as without a mesh.
        units = (*(1 for _ in weight.shape[:-2]), rows, math.lcm(columns, GROUP))
        for size, axis, unit in zip(weight.shape, axes, units, strict=True):
            parts = 1 if axis is None else axis_size(mesh, axis)
            if parts > 1 and size % (parts * unit):
                raise ValueError(
                    f"mesh: got {axis}={parts}, which cuts blocks of FP8 weights {weight.shape}: "
                    f"{size} is not a multiple of {parts} * {unit}"
                )
    return spec(mesh, *axes)


def rows_spec(mesh: AnyMesh) -> PartitionSpec:
    """Arrays with one row a request."""
    return spec(mesh, DATA_AXIS)


def pool_spec(mesh: AnyMesh) -> PartitionSpec:
    """Page pools: each group of requests has its own, spread over its context devices."""
    return spec(mesh, (DATA_AXIS, CONTEXT_AXIS))


def logits_spec(config: ModelConfig, mesh: AnyMesh) -> PartitionSpec:
    """Logits [batch, vocab]: the vocabulary is split as the head is, an embedding is not."""
    return spec(mesh, DATA_AXIS, None if config.tie_embeddings else MODEL_AXIS)


def check_cache(mesh: AnyMesh, *, num_pages: int, max_batch: int) -> None:
    """ValueError unless pages and rows can be dealt out evenly."""
    data, context = axis_size(mesh, DATA_AXIS), axis_size(mesh, CONTEXT_AXIS)
    if max_batch % data:
        raise ValueError(f"max_batch: got {max_batch}, expected a multiple of the mesh's {data=}")
    if num_pages % (data * context):
        raise ValueError(
            f"num_pages: got {num_pages}, expected a multiple of the mesh's {data=} * {context=}"
        )


def _model_specs(model: nnx.Module, mesh: AnyMesh) -> list[PartitionSpec]:
    """The layout of each array of `model`, in the order of its leaves."""
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    layouts = ([parameter_spec(v, mesh)] * len(jax.tree.leaves(v)) for v in variables)
    return list(itertools.chain.from_iterable(layouts))


def shard_model(model: Model, mesh: Mesh) -> Model:
    """The same model with its weights on `mesh`; each device is sent its own part of them.

    wq, wq_b and wkv_b are split by heads, wo by its inputs, the dense feed-forward by its hidden
    features, experts by their number, the head by the vocabulary, all over the axis `model`;
    everything else, an indexer too, is on every device. For a model that fits no single device, see
    `load_checkpoint(mesh=...)`. Errors: ValueError if the mesh does not divide the model.

    >>> from mla_jax import Decoder, presets
    >>> from mla_jax.sharding.mesh import make_mesh
    >>> model = shard_model(Decoder(presets["tiny"], rngs=nnx.Rngs(0)), make_mesh(model=1))
    >>> model.layers[0].attn.wo.weight.sharding.mesh.axis_names
    ('data', 'context', 'model')
    """
    check_mesh(model.config, mesh)
    arrays, tree = jax.tree.flatten(model)
    shardings = [NamedSharding(mesh, layout) for layout in _model_specs(model, mesh)]
    return jax.tree.unflatten(tree, jax.device_put(arrays, shardings))


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` set, if it has an axis of ours that is not yet taken apart."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = {DATA_AXIS, CONTEXT_AXIS, MODEL_AXIS} & set(mesh.axis_names)
    return mesh if ours - set(mesh.manual_axes) else None


def laid_out(tree: Any, specs: Any) -> Any:
    """`tree` as `specs` say, within jit or without, whichever kind the mesh's axes are."""
    mesh = jax.sharding.get_abstract_mesh()
    place = (
        jax.sharding.reshard
        if AxisType.Explicit in mesh.axis_types
        else jax.lax.with_sharding_constraint
    )
    return jax.tree.map(place, tree, specs)


def rows_together(logits: Array) -> Array:
    """Logits that were split over the vocabulary, whole on every device of the row's group."""
    mesh = mesh_in_use()
    return logits if mesh is None else laid_out(logits, rows_spec(mesh))


def replicated(array: Array) -> Array:
    """`array`, whole on every device."""
    return array if mesh_in_use() is None else laid_out(array, PartitionSpec())


def on_shards(
    step: Callable[..., tuple[Array, "PagedLatentCache"]],
    model: Any,
    cache: "PagedLatentCache",
    *rows: Array,
) -> tuple[Array, "PagedLatentCache"]:
    """step(model, cache, *rows) -> (logits, cache), each device with its own part of everything.

    rows: arrays with one row a request. The logits stay split over the vocabulary. Without a mesh
    this is the plain call.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return step(model, cache, *rows)
    check_mesh(model.config, mesh)
    check_cache(mesh, num_pages=cache.num_pages, max_batch=cache.max_batch)
    arrays, tree = jax.tree.flatten(model)
    in_specs = (_model_specs(model, mesh), cache.specs(mesh), *(rows_spec(mesh) for _ in rows))

    def part(arrays: list[Array], cache: "PagedLatentCache", *rows: Array):
        return step(jax.tree.unflatten(tree, arrays), cache, *rows)

    run = jax.shard_map(
        part,
        in_specs=in_specs,
        out_specs=(logits_spec(model.config, mesh), in_specs[1]),
        check_vma=False,
    )
    return run(*laid_out((arrays, cache, *rows), in_specs))
