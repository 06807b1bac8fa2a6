"""Checkpoints that cannot be loaded: each is one line that names the file and the tensor or key."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mla_jax import Decoder, MLAConfig, ModelConfig, MoEConfig
from mla_jax.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

V3 = ModelConfig(
    vocab=37,
    n_layers=2,
    inter_dim=28,
    n_dense=1,
    mla=MLAConfig(
        dim=20,
        n_heads=3,
        q_lora_rank=10,
        kv_lora_rank=14,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        dtype="float32",
    ),
    moe=MoEConfig(n_routed=4, n_active=2, inter_dim=12, n_shared=2, score="sigmoid"),
)
HF = V3.to_hf()
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
DOWN_3 = "model.layers.1.mlp.experts.3.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

Tensors = dict[str, np.ndarray]
WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def tensors(random_model: Callable[[ModelConfig], Decoder], tmp_path: Path) -> Tensors:
    """Those of a good checkpoint."""
    save_checkpoint(random_model(V3), tmp_path / "good")
    loaded = load_file(tmp_path / "good" / "model.safetensors")
    return {name: tensor.copy() for name, tensor in loaded.items()}


@pytest.fixture
def good(tensors: Tensors, write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(HF, tensors)


@pytest.fixture
def good_shards(tensors: Tensors, write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(HF, tensors, shards=2)


def check_error(path: Path, *words: str, dtype: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for word in words:
        assert word in message
    return message


def replace(tensors: Tensors, name: str, value: np.ndarray) -> None:
    assert name in tensors
    tensors[name] = value


def poison(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[DOWN_3][2, 1] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KV_A), ("missing", KV_A)),
        (lambda t: t.update(extra=t[KV_A]), ("unexpected extra",)),
        (lambda t: replace(t, KV_A, t[KV_A].T.copy()), (KV_A, "(20, 18)", "expected (18, 20)")),
        (lambda t: replace(t, DOWN_3, t[DOWN_3][:-1]), (DOWN_3, "(19, 12)", "expected (20, 12)")),
        (lambda t: replace(t, KV_A, t[KV_A].astype(np.int32)), (KV_A, "dtype I32", "BF16")),
        (lambda t: replace(t, BIAS, t[BIAS].astype(jnp.float8_e4m3fn)), (BIAS, "F8_E4M3")),
        (lambda t: replace(t, KV_A, t[KV_A].astype(jnp.float8_e4m3fn)), ("missing", "_scale_inv")),
        (
            lambda t: t.update({KV_A + "_scale_inv": np.ones((1, 1), np.float32)}),
            ("scales without an FP8 weight", KV_A + "_scale_inv"),
        ),
        (
            lambda t: t.update({"model.layers.0.x.weight_scale_inv": np.ones((1, 1), np.float32)}),
            ("scales without an FP8 weight", "model.layers.0.x.weight_scale_inv"),
        ),
        (
            lambda t: t.update(
                {
                    KV_A: t[KV_A].astype(jnp.float8_e4m3fn),
                    KV_A + "_scale_inv": np.ones((1, 2), np.float32),
                }
            ),
            (KV_A + "_scale_inv", "(1, 2)", "expected (1, 1)"),
        ),
        (poison(np.nan), (DOWN_3, "not finite")),
        (poison(np.inf), (DOWN_3, "not finite")),
    ],
    ids=[
        *("missing", "unexpected", "transposed", "short expert", "integers", "fp8 vector"),
        *("no scale", "scale of float32", "scale of nothing", "scale shape", "nan", "inf"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_wrong_tensors(
    change: Callable[[Tensors], Any],
    words: tuple[str, ...],
    shards: int,
    tensors: Tensors,
    write_checkpoint: WriteCheckpoint,
) -> None:
    change(tensors)
    check_error(write_checkpoint(HF, tensors, shards=shards), *words)


def test_values_beyond_the_asked_dtype(tensors: Tensors, write_checkpoint: WriteCheckpoint) -> None:
    tensors[DOWN_3][0, 0] = 1e6
    path = write_checkpoint(HF, tensors)
    load_checkpoint(path, dtype="bfloat16")
    check_error(path, DOWN_3, "not finite in float16", dtype="float16")


def test_many_names_are_counted(tensors: Tensors, write_checkpoint: WriteCheckpoint) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    assert len(tensors) - len(kept) == 12
    message = check_error(write_checkpoint(HF, kept), "and 8 more")
    assert len(re.findall(r"experts\.\d", message)) == 4


def test_another_architecture_lists_both_sides(
    tensors: Tensors, write_checkpoint: WriteCheckpoint
) -> None:
    path = write_checkpoint(HF | {"q_lora_rank": None}, tensors)
    check_error(
        path,
        "missing model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight;",
        "; unexpected model.layers.0.self_attn.q_a_layernorm.weight",
    )


def test_layers_beyond_the_models_are_unexpected(
    tensors: Tensors, write_checkpoint: WriteCheckpoint
) -> None:
    extra = "model.layers.2.self_attn.o_proj.weight"
    tensors[extra] = tensors["model.layers.1.self_attn.o_proj.weight"]
    check_error(write_checkpoint(HF, tensors), f"unexpected {extra}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ("model_type = 'llama'", "deepseek_v3")),
        ({"kv_lora_rank": None}, ("missing key 'kv_lora_rank'",)),
        ({"hidden_size": "20"}, ("hidden_size = '20'", "an integer")),
        ({"qk_rope_head_dim": 3}, ("qk_rope_head_dim: got 3", "even")),
        ({"dtype": "int8"}, ("dtype = 'int8'",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quant_method = 'gptq'", "'fp8'")),
    ],
)
def test_wrong_configs(
    changes: dict[str, Any],
    words: tuple[str, ...],
    tensors: Tensors,
    write_checkpoint: WriteCheckpoint,
) -> None:
    path = write_checkpoint(HF | changes, tensors)
    assert check_error(path, *words).startswith(f"{path / 'config.json'}: ")


def test_an_unknown_dtype_is_refused(good: Path) -> None:
    with pytest.raises(ValueError, match="dtype: got 'int8', expected one of"):
        load_checkpoint(good, dtype="int8")


def test_missing_files(good_shards: Path) -> None:
    check_error(good_shards / "nowhere", "no such directory")
    check_error(good_shards / "config.json", "no such directory")
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (good_shards / name).unlink()
        lost = name if "-of-" in name else "model.safetensors"
        check_error(good_shards, f"{lost}: no such file")
    (good_shards / "config.json").unlink()
    check_error(good_shards, "config.json: no such file")


def test_a_directory_where_a_file_should_be(good: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (good / name).unlink()
        (good / name).mkdir()
        check_error(good, name, "irectory")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[1]", "expected an object"),
        ("config.json", "\xff", "not valid JSON"),
        ("model.safetensors.index.json", "{'a': 1}", "not valid JSON"),
        ("model.safetensors.index.json", "{}", "weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "weight_map"),
    ],
)
def test_broken_json(name: str, text: str, words: str, good_shards: Path) -> None:
    (good_shards / name).write_bytes(text.encode("latin-1"))
    assert check_error(good_shards, words).startswith(str(good_shards / name))


def test_an_index_that_lists_more_than_the_shards_hold(good_shards: Path) -> None:
    file = good_shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    check_error(good_shards, "missing lost.weight in model-00001-of-00002.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -4, -1])
def test_truncated_files(keep: int, good: Path) -> None:
    file = good / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    check_error(good, "model.safetensors: truncated or corrupt safetensors")


def test_a_file_that_shrinks_while_it_is_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(file: Path, dtype: type, count: int, offset: int) -> np.ndarray:
        return np.zeros(count - 1, dtype)

    monkeypatch.setattr(np, "fromfile", short)
    check_error(good, "model.safetensors: ", ": truncated")


def test_corrupt_headers(good: Path) -> None:
    file = good / "model.safetensors"
    data = file.read_bytes()
    for old, new in ((b"[18,20]", b"[18,21]"), (b'"F32"', b'"F99"'), (b"{", b"}")):
        assert old in data
        file.write_bytes(data.replace(old, new, 1))
        check_error(good, "model.safetensors: truncated or corrupt safetensors")
