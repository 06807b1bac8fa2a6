"""Checkpoints in the Hugging Face layout: config.json and safetensors files.

Loading streams: a tensor's bytes are read, put on the device and converted there before the next
tensor is touched. The host holds about one tensor, the device the model and one tensor. On a mesh
each device is sent its own part of every tensor, and holds its part of the model and of one tensor.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from mla_jax._safetensors import (
    CONFIG,
    DTYPES,
    FP8,
    WEIGHTS,
    CheckpointError,
    StoredTensor,
    few,
    read_headers,
    read_json,
)
from mla_jax._tensor_reader import reader
from mla_jax.config import ModelConfig
from mla_jax.nn import Decoder
from mla_jax.nn.linear import Weight
from mla_jax.quantization import (
    quantization_config,
    scales_are_powers_of_two,
    weight_block_size,
)
from mla_jax.sharding.assembly import ShardedBuffer
from mla_jax.sharding.layout import parameter_spec
from mla_jax.sharding.mesh import check_mesh
from pallas_kernels.block_scaled import BlockScaled, scale_shape

SCALE = "_scale_inv"
"""What an FP8 tensor's name ends in, to name its block scales."""

# A tensor of the checkpoint, our parameter, and the tensor's place in it if it holds several.
_Row = tuple[str, str, tuple[int, ...]]

_OUTSIDE: tuple[_Row, ...] = (
    ("model.embed_tokens.weight", "embed", ()),
    ("model.norm.weight", "norm.weight", ()),
    ("lm_head.weight", "head", ()),
)
_ATTENTION: tuple[_Row, ...] = (
    ("input_layernorm.weight", "attn_norm.weight", ()),
    ("self_attn.q_proj.weight", "attn.wq.weight", ()),
    ("self_attn.q_a_proj.weight", "attn.wq_a.weight", ()),
    ("self_attn.q_a_layernorm.weight", "attn.q_norm.weight", ()),
    ("self_attn.q_b_proj.weight", "attn.wq_b.weight", ()),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn.wkv_a.weight", ()),
    ("self_attn.kv_a_layernorm.weight", "attn.kv_norm.weight", ()),
    ("self_attn.kv_b_proj.weight", "attn.wkv_b.weight", ()),
    ("self_attn.o_proj.weight", "attn.wo.weight", ()),
    ("self_attn.indexer.wq_b.weight", "attn.indexer.wq_b.weight", ()),
    ("self_attn.indexer.wk.weight", "attn.indexer.wk.weight", ()),
    ("self_attn.indexer.k_norm.weight", "attn.indexer.k_norm.weight", ()),
    ("self_attn.indexer.k_norm.bias", "attn.indexer.k_norm.bias", ()),
    ("self_attn.indexer.weights_proj.weight", "attn.indexer.weights_proj.weight", ()),
    ("post_attention_layernorm.weight", "ffn_norm.weight", ()),
)
_DENSE: tuple[_Row, ...] = (
    ("mlp.gate_proj.weight", "ffn.gate_up", (0,)),
    ("mlp.up_proj.weight", "ffn.gate_up", (1,)),
    ("mlp.down_proj.weight", "ffn.down.weight", ()),
)
_MOE: tuple[_Row, ...] = (
    ("mlp.gate.weight", "ffn.router.weight", ()),
    ("mlp.gate.e_score_correction_bias", "ffn.router.bias", ()),
    ("mlp.shared_experts.gate_proj.weight", "ffn.shared.gate_up", (0,)),
    ("mlp.shared_experts.up_proj.weight", "ffn.shared.gate_up", (1,)),
    ("mlp.shared_experts.down_proj.weight", "ffn.shared.down.weight", ()),
)
_EXPERT: tuple[_Row, ...] = (
    ("mlp.experts.{e}.gate_proj.weight", "ffn.gate_up", (0,)),
    ("mlp.experts.{e}.up_proj.weight", "ffn.gate_up", (1,)),
    ("mlp.experts.{e}.down_proj.weight", "ffn.down", ()),
)
_FUSED_EXPERTS: tuple[_Row, ...] = (
    ("mlp.experts.gate_up_proj", "ffn.gate_up", ()),
    ("mlp.experts.down_proj", "ffn.down", ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of a checkpoint, and the part of a parameter that it is."""

    tensor: str
    parameter: str
    slot: tuple[int, ...]

    def part(self, parameter: nnx.Variable) -> tuple[int, ...]:
        """The shape of the part."""
        return parameter.shape[len(self.slot) :]

    def stored(self, parameter: nnx.Variable) -> tuple[int, ...]:
        """The shape of the tensor: fused experts have gate and up in one axis, [E, 2 I, D]."""
        part = self.part(parameter)
        return part if len(part) < 4 else (part[0], part[1] * part[2], part[3])


def _entries(
    config: ModelConfig, parameters: Container[str], stored: Container[str]
) -> Iterator[_Entry]:
    """The tensors that fill `parameters`; experts are fused in the layers where `stored` has it."""
    rows = list(_OUTSIDE)
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        layer = list(_ATTENTION)
        if config.moe is None or not config.is_moe(i):
            layer += _DENSE
        elif any(theirs + tensor in stored for tensor, _, _ in _FUSED_EXPERTS):
            layer += _MOE + _FUSED_EXPERTS
        else:
            layer += _MOE
            for e in range(config.moe.n_routed):
                layer += [(name.format(e=e), target, (e, *slot)) for name, target, slot in _EXPERT]
        rows += [(theirs + name, ours + target, slot) for name, target, slot in layer]
    for name, target, slot in rows:
        # A model has one form of the query projection, and perhaps no indexer, head, bias or
        # shared experts.
        if target in parameters:
            yield _Entry(tensor=name, parameter=target, slot=slot)


def _parameters(model: Decoder) -> dict[str, nnx.Variable]:
    """The model's own variables, by their dotted paths."""
    nodes = nnx.iter_graph(model)
    return {".".join(map(str, p)): node for p, node in nodes if isinstance(node, nnx.Variable)}


# --- Checks, all of them made before the first weight is read.


def _is_part(tensor: StoredTensor, config: ModelConfig, extra_layers: int) -> bool:
    """Whether a tensor is part of the decoder, not recomputed, tied, empty or of a further layer.

    `extra_layers` after the last predict several tokens at once.
    """
    beyond = range(config.n_layers, config.n_layers + extra_layers)
    return not (
        tensor.name.endswith("rotary_emb.inv_freq")
        or tensor.name.startswith(tuple(f"model.layers.{i}." for i in beyond))
        or (config.tie_embeddings and tensor.name == "lm_head.weight")
        or tensor.size == 0
    )


def _check(
    root: Path,
    entries: list[_Entry],
    parameters: Mapping[str, nnx.Variable],
    stored: Mapping[str, StoredTensor],
    block: tuple[int, int],
) -> None:
    """Every tensor is there, in its shape and a dtype that can be read, and no other is."""
    expected = {entry.tensor: entry.stored(parameters[entry.parameter]) for entry in entries}
    for name, shape in list(expected.items()):
        if name in stored and stored[name].dtype == FP8 and len(shape) > 1:
            expected[name + SCALE] = scale_shape(shape, block)
    missing = [name for name in expected if name not in stored]
    rest = [name for name in stored if name not in expected]
    groups = {
        "missing": missing,
        "unexpected": [name for name in rest if not name.endswith(SCALE)],
        "scales without an FP8 weight:": [name for name in rest if name.endswith(SCALE)],
    }
    problems = [few(what, names) for what, names in groups.items() if names]
    if problems:
        raise CheckpointError(f"{root}: {'; '.join(problems)}")
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: {name}: got shape {tensor.shape}, expected {shape}"
            )
        scaled = name + SCALE in expected
        if tensor.dtype not in DTYPES or (tensor.dtype == FP8 and not scaled):
            raise CheckpointError(
                f"{tensor.file}: {name}: dtype {tensor.dtype} is not supported here, "
                f"expected one of {', '.join(DTYPES)}, and {FP8} only for scaled matrices"
            )


def _keep_fp8(
    root: Path,
    entries: list[_Entry],
    parameters: Mapping[str, nnx.Variable],
    stored: Mapping[str, StoredTensor],
    empty: Callable[[tuple[int, ...]], BlockScaled],
) -> None:
    """Give the parameters whose tensors are FP8 the form of `empty`, with no numbers yet."""
    # The matrices of a feed-forward run together: all are FP8, or none is.
    together: dict[str, list[_Entry]] = {}
    for entry in entries:
        if isinstance(parameters[entry.parameter], Weight):
            layer, ffn, _ = entry.parameter.partition(".ffn.")
            together.setdefault(layer if ffn else entry.parameter, []).append(entry)
    for group in together.values():
        other = [entry.tensor for entry in group if stored[entry.tensor].dtype != FP8]
        if len(other) == len(group):
            continue
        if other:
            raise CheckpointError(f"{root}: {few('not FP8, beside matrices that are:', other)}")
        for entry in group:
            parameter = parameters[entry.parameter]
            scaled = empty(parameter.shape)
            inter, rows = parameter.shape[-2], scaled.block_size[0]
            if entry.part(parameter) != entry.stored(parameter) and inter % rows:
                raise CheckpointError(
                    f"{stored[entry.tensor].file}: {entry.tensor}: gate and up have {inter} rows "
                    f"each and scales in common, expected whole blocks of {rows} to keep FP8"
                )
            parameter.set_value(scaled)


# --- Loading and saving.


def _own_dtype(hf: dict[str, Any], config: ModelConfig, stored: Mapping[str, StoredTensor]) -> str:
    """bfloat16 if weights are FP8, else the config's dtype, else the embedding's."""
    if any(tensor.dtype == FP8 for tensor in stored.values()):
        return "bfloat16"
    embedding = stored.get("model.embed_tokens.weight")
    if hf.get("dtype") or hf.get("torch_dtype") or embedding is None:
        return config.dtype
    return str(DTYPES.get(embedding.dtype, config.dtype))


def load_checkpoint(
    path: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The model of a Hugging Face checkpoint directory, on the default device or on a mesh.

    Reads config.json (`deepseek_v2`, `deepseek_v3` or `deepseek_v32`) and model.safetensors, or the
    shards that model.safetensors.index.json lists. FP8 weights are multiplied by their block
    scales. dtype: "float32", "bfloat16" or "float16"; None is bfloat16 if weights are FP8, else the
    checkpoint's own (its config's, or if that gives none its embedding's). "fp8" leaves FP8
    matrices as they are, scales beside them, and everything else is bfloat16: half the memory, and
    products as in `pallas_kernels.block_scaled.scaled_product`. The router's correction bias and
    the indexer's norm stay float32. mesh: the layout is `sharding.shard_model`'s.

    Streams: see the module's docstring. Nothing is read but headers until every name, shape and
    dtype has been checked. Errors: CheckpointError, a ValueError, naming the file and the tensor or
    key: what is missing, unexpected, of another shape or dtype, truncated, or not finite;
    "fp8" of a checkpoint without FP8 weights, or with a feed-forward that is FP8 in part;
    ValueError if the mesh does not divide the model, or would cut blocks that stay FP8.

    >>> import jax.numpy as jnp
    >>> from tempfile import TemporaryDirectory
    >>> from mla_jax import presets
    >>> with TemporaryDirectory() as directory:
    ...     save_checkpoint(Decoder(presets["tiny"], rngs=nnx.Rngs(0)), directory)
    ...     load_checkpoint(directory)(jnp.zeros((1, 4), jnp.int32)).shape
    (1, 4, 256)
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    hf = read_json(root / CONFIG)
    keep = dtype == "fp8"
    try:
        config, block = ModelConfig.from_hf(hf), weight_block_size(hf)
        power_of_two = keep and scales_are_powers_of_two(hf)
    except ValueError as error:
        reason = str(error).removeprefix(f"{CONFIG}: ")
        raise CheckpointError(f"{root / CONFIG}: {reason}") from None
    extra_layers = hf.get("num_nextn_predict_layers")
    extra_layers = extra_layers if isinstance(extra_layers, int) else 0
    stored = {
        name: tensor
        for name, tensor in read_headers(root).items()
        if _is_part(tensor, config, extra_layers)
    }
    if keep and all(tensor.dtype != FP8 for tensor in stored.values()):
        raise CheckpointError(
            f"{root}: dtype: got 'fp8', expected tensors in {FP8}, there are none"
        )
    if dtype is None or keep:
        dtype = _own_dtype(hf, config, stored)
    config = config.replace_dtype(dtype)
    if mesh is not None:
        check_mesh(config, mesh)

    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    parameters = _parameters(model)
    entries = list(_entries(config, parameters, stored))
    _check(root, entries, parameters, stored, block)
    if keep:
        empty = partial(BlockScaled.of_shape, block_size=block, power_of_two=power_of_two)
        _keep_fp8(root, entries, parameters, stored, empty)

    def place(entry: _Entry) -> tuple[Path, int]:
        return stored[entry.tensor].file, stored[entry.tensor].start

    buffers = {name: _buffers(parameter, mesh) for name, parameter in parameters.items()}
    for entry in sorted(entries, key=place):
        tensor, scale = stored[entry.tensor], stored.get(entry.tensor + SCALE)
        parts = jax.tree.leaves(buffers[entry.parameter])
        # An array takes the two multiplied, what stays FP8 each by itself.
        sources = [(tensor, scale)] if len(parts) == 1 else [(tensor, None), (scale, None)]
        for part, source in zip(parts, sources, strict=True):
            part.fill(entry.slot, reader(*source, str(part.dtype), block))
    for name, parameter in parameters.items():
        parameter.set_value(jax.tree.map(ShardedBuffer.array, buffers[name]))
    return model


def _buffers(parameter: nnx.Variable, mesh: Mesh | None) -> Any:
    """The parameter's value with a buffer in place of each array."""
    place = None if mesh is None else NamedSharding(mesh, parameter_spec(parameter, mesh))
    return jax.tree.map(
        lambda array: ShardedBuffer(array.shape, array.dtype, place), parameter.get_value()
    )


def save_checkpoint(model: Decoder, path: str | os.PathLike[str]) -> None:
    """Write `model` as a Hugging Face checkpoint that `load_checkpoint` and transformers read.

    The directory appears whole or not at all; in one that exists, each of the two files is replaced
    whole. FP8 weights are written with their scales. The model passes through host memory. Errors:
    ValueError for a config that Hugging Face's model types cannot say, OSError.

    >>> from tempfile import TemporaryDirectory
    >>> from mla_jax import presets
    >>> with TemporaryDirectory() as directory:
    ...     save_checkpoint(Decoder(presets["tiny"], rngs=nnx.Rngs(0)), directory)
    ...     sorted(os.listdir(directory))
    ['config.json', 'model.safetensors']
    """
    config = model.config.to_hf()
    parameters = _parameters(model)
    tensors: dict[str, np.ndarray] = {}
    for entry in _entries(model.config, parameters, stored=()):
        value = parameters[entry.parameter].get_value()[entry.slot]
        if isinstance(value, BlockScaled):
            config["quantization_config"] = quantization_config(value)
            tensors[entry.tensor + SCALE] = np.ascontiguousarray(value.scales)
            value = value.values
        tensors[entry.tensor] = np.ascontiguousarray(value)
    root = Path(path).resolve()
    root.parent.mkdir(parents=True, exist_ok=True)
    # A draft in the same file system, so that renaming it is all that readers can see.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        draft = Path(scratch, root.name)
        draft.mkdir()
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes files that none but their owner can read.
        shutil.copymode(draft / CONFIG, draft / WEIGHTS)
        if not root.exists():
            draft.rename(root)
            return
        for name in (WEIGHTS, CONFIG):
            (draft / name).replace(root / name)
