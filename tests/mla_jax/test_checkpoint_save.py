"""Saving a checkpoint: whole or not at all."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from mla_jax import Decoder, ModelConfig, presets
from mla_jax.checkpoint import load_checkpoint, save_checkpoint

RandomModel = Callable[[ModelConfig], Decoder]

TINY = presets["tiny"]
INDEXED = dataclasses.replace(
    TINY,
    n_layers=2,
    mla=dataclasses.replace(TINY.mla, index_n_heads=3, index_head_dim=32, dtype="bfloat16"),
)
OTHER = dataclasses.replace(TINY, vocab=300, tie_embeddings=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_failed_save_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_model: RandomModel
) -> None:
    save_checkpoint(random_model(TINY), tmp_path / "old")
    before = contents(tmp_path / "old")

    def full_disk(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("mla_jax.checkpoint.save_file", full_disk)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(random_model(OTHER), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert contents(tmp_path / "old") == before


def test_saving_into_a_directory_replaces_two_files_and_keeps_the_rest(
    tmp_path: Path, random_model: RandomModel
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(random_model(OTHER), tmp_path)
    save_checkpoint(random_model(TINY), tmp_path)
    assert load_checkpoint(tmp_path).config == TINY
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_weights_are_as_readable_as_the_config(
    tmp_path: Path, random_model: RandomModel
) -> None:
    save_checkpoint(random_model(TINY), tmp_path / "new" / "model")
    files = [file.stat().st_mode for file in (tmp_path / "new" / "model").iterdir()]
    assert len(files) == 2
    assert len(set(files)) == 1


def test_what_hugging_face_cannot_say_is_not_saved(
    tmp_path: Path, random_model: RandomModel
) -> None:
    assert TINY.moe is not None
    moe = dataclasses.replace(TINY.moe, score="softmax", normalize=True)
    model = random_model(dataclasses.replace(TINY, moe=moe))
    with pytest.raises(ValueError, match="normalize: got True"):
        save_checkpoint(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_indexers_tensors(tmp_path: Path, random_model: RandomModel) -> None:
    """Under the names of DeepSeek-V3.2's checkpoints, whose norm of the keys is float32."""
    model = random_model(INDEXED)
    save_checkpoint(model, tmp_path)
    ours = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    shapes = {
        "wq_b.weight": ((96, 96), "BF16"),
        "wk.weight": ((32, 192), "BF16"),
        "k_norm.weight": ((32,), "F32"),
        "k_norm.bias": ((32,), "F32"),
        "weights_proj.weight": ((3, 192), "BF16"),
    }
    with safe_open(tmp_path / "model.safetensors", framework="flax") as stored:
        names = [name for name in stored.keys() if ".indexer." in name]  # noqa: SIM118
        assert len(names) == 2 * len(shapes)
        for layer in range(2):
            for name, (shape, dtype) in shapes.items():
                tensor = f"model.layers.{layer}.self_attn.indexer.{name}"
                header = stored.get_slice(tensor)
                assert (tuple(header.get_shape()), header.get_dtype()) == (shape, dtype)
                value = ours[f"layers.{layer}.attn.indexer.{name}"]
                np.testing.assert_array_equal(stored.get_tensor(tensor), value)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == INDEXED
    for path, variable in nnx.to_flat_state(nnx.state(loaded)):
        value = ours[".".join(map(str, path))]
        assert variable.dtype == value.dtype
        assert jnp.array_equal(variable.get_value(), value), path
