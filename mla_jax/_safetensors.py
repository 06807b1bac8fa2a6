"""A checkpoint's files: JSON, and safetensors headers whose tensors are read one by one."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FP8 = "F8_E4M3"
DTYPES = {
    "F32": jnp.dtype(jnp.float32),
    "F16": jnp.dtype(jnp.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    FP8: jnp.dtype(jnp.float8_e4m3fn),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: one line that names the file, and the tensor or key."""


def few(what: str, names: list[str], limit: int = 4) -> str:
    """One line for any number of names: what a, b, c, d and 3 more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{what} {', '.join(names[:limit])}{more}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file. `read` takes its bytes from the file, and no others."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tensor's rows from start to stop along its first axis, in memory of their own."""
        # Not by safetensors, which has no FP8 for NumPy.
        row = self.size // self.shape[0]
        try:
            data = np.fromfile(
                self.file, np.uint8, row * (stop - start), offset=self.start + row * start
            )
        except OSError as error:
            raise CheckpointError(f"{self.file}: {self.name}: {error.strerror}") from None
        if data.size != row * (stop - start):
            raise CheckpointError(f"{self.file}: {self.name}: truncated")
        return data.view(DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])


def _read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a file, once safetensors has checked that it holds all of their bytes."""
    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: truncated or corrupt safetensors ({error})") from None
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        yield StoredTensor(
            file=file,
            name=name,
            dtype=tensor["dtype"],
            shape=tuple(tensor["shape"]),
            start=8 + length + start,
            size=end - start,
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a JSON {type(value).__name__}, expected an object")
    return value


def read_headers(root: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, in one file or in the shards that an index lists."""
    if (root / WEIGHTS).exists() or not (root / INDEX).exists():
        return {tensor.name: tensor for tensor in _read_header(root / WEIGHTS)}
    shards = read_json(root / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{root / INDEX}: weight_map: expected a file name for each tensor")
    stored = {
        tensor.name: tensor
        for shard in sorted(set(shards.values()))
        for tensor in _read_header(root / shard)
        if shards.get(tensor.name, shard) == shard
    }
    lost = [f"{name} in {shard}" for name, shard in shards.items() if name not in stored]
    if lost:
        raise CheckpointError(f"{root / INDEX}: {few('missing', lost)}")
    return stored
