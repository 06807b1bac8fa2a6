"""Saving a checkpoint: whole or not at all."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mla_jax import Decoder, ModelConfig, presets
from mla_jax.checkpoint import load_checkpoint, save_checkpoint

RandomModel = Callable[[ModelConfig], Decoder]

TINY = presets["tiny"]
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
