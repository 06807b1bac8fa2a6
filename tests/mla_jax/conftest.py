"""Checkpoints and models for the tests, made without the code that they test."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from benched import Run
from flax import nnx
from safetensors.numpy import save_file

from mla_jax import Decoder, ModelConfig
from mla_jax.bench import timing
from mla_jax.cli.main import main


@pytest.fixture
def random_model(rng: np.random.Generator) -> Callable[[ModelConfig], Decoder]:
    """A model of a config, with every parameter drawn anew from N(0, 1)."""

    def build(config: ModelConfig) -> Decoder:
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        state = nnx.state(model)
        for _, variable in nnx.to_flat_state(state):
            value = rng.standard_normal(variable.shape, np.float32)
            variable.set_value(jnp.asarray(value.astype(variable.dtype)))
        nnx.update(model, state)
        return model

    return build


@pytest.fixture
def bench_command(monkeypatch, capsys) -> Callable[..., Run]:
    """Makes a run of `mla-jax bench` of a module over tiny shapes, with made-up ceilings.

    run(*argv): (status, out, err).
    """

    def make(module: ModuleType, shapes: dict[str, Any], ceilings: dict[str, float]) -> Run:
        monkeypatch.setattr(module, "SHAPES", shapes)
        monkeypatch.setattr(timing, "measure_ceilings", lambda: ceilings)
        monkeypatch.setattr(timing, "BURST_SECONDS", 1e-3)

        def run(*argv: str) -> tuple[int, str, str]:
            status = main(["bench", module.__name__.rpartition(".")[2], *argv])
            return status, *capsys.readouterr()

        return run

    return make


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config.json and tensors under tmp_path / name, in one file or in shards."""

    def write(
        hf: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        name: str = "model",
        shards: int = 1,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(hf))
        if shards == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        weight_map = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            # Dealt out one by one: the tensors of a layer, and of a stack, come from every shard.
            part = {tensor: tensors[tensor] for tensor in list(tensors)[i::shards]}
            save_file(part, directory / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return write
