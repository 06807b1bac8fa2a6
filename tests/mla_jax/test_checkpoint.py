"""Checkpoints: every tensor in its place, and read one at a time."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mla_jax import Decoder, ModelConfig, presets
from mla_jax.checkpoint import load_checkpoint, save_checkpoint

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "dtype": "float32",
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
}
V2 = V3 | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "topk_method": "group_limited_greedy",
    "n_shared_experts": None,
}
TIED = V3 | {"tie_word_embeddings": True, "first_k_dense_replace": 2}
CONFIGS = {"v3": V3, "v2": V2, "tied-dense": TIED}

Tensors = dict[str, np.ndarray]
RandomModel = Callable[[ModelConfig], Decoder]
WriteCheckpoint = Callable[..., Path]


def hf_tensors(hf: dict[str, Any], rng: np.random.Generator) -> Tensors:
    """Random tensors under the names and in the shapes that Hugging Face's models give them."""
    dim, heads, vocab = hf["hidden_size"], hf["num_attention_heads"], hf["vocab_size"]
    latent, rope = hf["kv_lora_rank"], hf["qk_rope_head_dim"]
    nope, value = hf["qk_nope_head_dim"], hf["v_head_dim"]
    query = heads * (nope + rope)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, dim),
        "model.norm.weight": (dim,),
    }
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, dim)
    for i in range(hf["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
            "self_attn.kv_a_proj_with_mqa": (latent + rope, dim),
            "self_attn.kv_a_layernorm": (latent,),
            "self_attn.kv_b_proj": (heads * (nope + value), latent),
            "self_attn.o_proj": (dim, heads * value),
        }
        if hf["q_lora_rank"]:
            layer["self_attn.q_a_proj"] = (hf["q_lora_rank"], dim)
            layer["self_attn.q_a_layernorm"] = (hf["q_lora_rank"],)
            layer["self_attn.q_b_proj"] = (query, hf["q_lora_rank"])
        else:
            layer["self_attn.q_proj"] = (query, dim)
        inter = hf["moe_intermediate_size"]
        if i < hf["first_k_dense_replace"]:
            blocks = {"mlp": hf["intermediate_size"]}
        else:
            blocks = {f"mlp.experts.{e}": inter for e in range(hf["n_routed_experts"])}
            if hf["n_shared_experts"]:
                blocks["mlp.shared_experts"] = hf["n_shared_experts"] * inter
            layer["mlp.gate"] = (hf["n_routed_experts"], dim)
        for block, width in blocks.items():
            layer[f"{block}.gate_proj"] = layer[f"{block}.up_proj"] = (width, dim)
            layer[f"{block}.down_proj"] = (dim, width)
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if "mlp.gate" in layer and hf["model_type"] == "deepseek_v3":
            bias = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
            shapes[bias] = (hf["n_routed_experts"],)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def parameters(model: Decoder) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def assert_same(got: Decoder, expected: Decoder) -> None:
    got_parameters, expected_parameters = parameters(got), parameters(expected)
    assert got_parameters.keys() == expected_parameters.keys()
    for name, parameter in expected_parameters.items():
        assert got_parameters[name].dtype == parameter.dtype, name
        np.testing.assert_array_equal(
            np.asarray(got_parameters[name]), np.asarray(parameter), err_msg=name
        )


@pytest.fixture(params=CONFIGS)
def hf(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def test_every_tensor_is_in_its_place(
    hf: dict[str, Any], rng: np.random.Generator, write_checkpoint: WriteCheckpoint
) -> None:
    tensors = hf_tensors(hf, rng)
    model = load_checkpoint(write_checkpoint(hf, tensors))
    filled = parameters(model)

    def take(name: str) -> np.ndarray:
        return tensors.pop(name + ".weight")

    def check(name: str, expected: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(filled.pop(name)), expected, err_msg=name)

    def check_feed_forward(ours: str, theirs: str) -> None:
        gate_up = np.stack([take(f"{theirs}.gate_proj"), take(f"{theirs}.up_proj")])
        check(f"{ours}.gate_up", gate_up)
        check(f"{ours}.down.weight", take(f"{theirs}.down_proj"))

    check("embed", take("model.embed_tokens"))
    check("norm.weight", take("model.norm"))
    if not hf.get("tie_word_embeddings"):
        check("head", take("lm_head"))
    for i in range(hf["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        attention = {
            "wkv_a": "kv_a_proj_with_mqa",
            "kv_norm": "kv_a_layernorm",
            "wkv_b": "kv_b_proj",
            "wo": "o_proj",
        }
        low_rank = {"wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj"}
        attention |= low_rank if hf["q_lora_rank"] else {"wq": "q_proj"}
        for our_name, their_name in attention.items():
            check(f"{ours}.attn.{our_name}.weight", take(f"{theirs}.self_attn.{their_name}"))
        check(f"{ours}.attn_norm.weight", take(f"{theirs}.input_layernorm"))
        check(f"{ours}.ffn_norm.weight", take(f"{theirs}.post_attention_layernorm"))
        if i < hf["first_k_dense_replace"]:
            check_feed_forward(f"{ours}.ffn", f"{theirs}.mlp")
            continue
        gate_up, down = [], []
        for e in range(hf["n_routed_experts"]):
            expert = f"{theirs}.mlp.experts.{e}"
            gate_up.append([take(f"{expert}.gate_proj"), take(f"{expert}.up_proj")])
            down.append(take(f"{expert}.down_proj"))
        check(f"{ours}.ffn.gate_up", np.array(gate_up))
        check(f"{ours}.ffn.down", np.array(down))
        check(f"{ours}.ffn.router.weight", take(f"{theirs}.mlp.gate"))
        if hf["n_shared_experts"]:
            check_feed_forward(f"{ours}.ffn.shared", f"{theirs}.mlp.shared_experts")
        if hf["model_type"] == "deepseek_v3":
            bias = tensors.pop(f"{theirs}.mlp.gate.e_score_correction_bias")
            check(f"{ours}.ffn.router.bias", bias)
    assert not tensors
    assert not filled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_and_loaded_is_the_same(
    hf: dict[str, Any], dtype: str, tmp_path: Path, random_model: RandomModel
) -> None:
    config = ModelConfig.from_hf(hf).replace_dtype(dtype)
    model = random_model(config)
    save_checkpoint(model, tmp_path / "new" / "model")
    loaded = load_checkpoint(tmp_path / "new" / "model")
    assert loaded.config == config
    assert_same(loaded, model)


def test_saved_under_hugging_face_names(
    hf: dict[str, Any], rng: np.random.Generator, tmp_path: Path, write_checkpoint: WriteCheckpoint
) -> None:
    tensors = hf_tensors(hf, rng)
    save_checkpoint(load_checkpoint(write_checkpoint(hf, tensors, name="a")), tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_shipped_architecture_survives_and_runs(
    tmp_path: Path, random_model: RandomModel
) -> None:
    model = random_model(presets["tiny"])
    save_checkpoint(model, tmp_path / "tiny")
    loaded = load_checkpoint(tmp_path / "tiny")
    assert loaded.config == presets["tiny"]
    assert_same(loaded, model)
    logits = nnx.jit(lambda model, tokens: model(tokens))(loaded, jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, 256)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards(
    hf: dict[str, Any], shards: int, rng: np.random.Generator, write_checkpoint: WriteCheckpoint
) -> None:
    tensors = hf_tensors(hf, rng)
    whole = load_checkpoint(write_checkpoint(hf, tensors, name="whole"))
    assert_same(load_checkpoint(write_checkpoint(hf, tensors, shards=shards)), whole)


def fuse_experts(hf: dict[str, Any], tensors: Tensors) -> Tensors:
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for i in range(hf["first_k_dense_replace"], hf["num_hidden_layers"]):
        experts = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            [tensors[f"{experts}.{e}.{m}_proj.weight"] for e in range(hf["n_routed_experts"])]
            for m in ("gate", "up", "down")
        )
        fused[f"{experts}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{experts}.down_proj"] = np.stack(down)
    return fused


def test_fused_experts(rng: np.random.Generator, write_checkpoint: WriteCheckpoint) -> None:
    tensors = hf_tensors(V3, rng)
    separate = load_checkpoint(write_checkpoint(V3, tensors, name="separate"))
    fused = load_checkpoint(write_checkpoint(V3, fuse_experts(V3, tensors), name="fused"))
    assert_same(fused, separate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_converted_to_the_dtype_that_is_asked(
    dtype: str, rng: np.random.Generator, write_checkpoint: WriteCheckpoint
) -> None:
    tensors = hf_tensors(V3, rng)
    model = load_checkpoint(write_checkpoint(V3, tensors), dtype=dtype)
    assert model.config.dtype == dtype
    filled = parameters(model)
    assert {str(p.dtype) for name, p in filled.items() if name != "layers.1.ffn.router.bias"} == {
        dtype
    }
    assert filled["layers.1.ffn.router.bias"].dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(filled["embed"]), tensors["model.embed_tokens.weight"].astype(jnp.dtype(dtype))
    )


@pytest.mark.parametrize(
    ("given", "stored", "expected"),
    [
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float32", "float16"),
        ({"dtype": None}, "float32", "float32"),
        ({"dtype": None}, "bfloat16", "bfloat16"),
        ({"dtype": None}, "float16", "float16"),
    ],
)
def test_dtype_none_is_the_checkpoints_own(
    given: dict[str, str],
    stored: str,
    expected: str,
    rng: np.random.Generator,
    write_checkpoint: WriteCheckpoint,
) -> None:
    tensors = {k: v.astype(jnp.dtype(stored)) for k, v in hf_tensors(V2, rng).items()}
    assert load_checkpoint(write_checkpoint(V2 | given, tensors)).config.dtype == expected


# --- FP8.


def quantize(
    tensors: Tensors, block: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensors, Tensors]:
    """(FP8 weights with scales for every matrix, what they mean in float32)."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        *stack, m, n = tensor.shape
        blocks = (*stack, -(-m // block[0]), -(-n // block[1]))
        scale = rng.uniform(0.5, 2.0, blocks).astype(np.float32)
        stored[name] = tensor.astype(jnp.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        spread = np.repeat(np.repeat(scale, block[0], axis=-2), block[1], axis=-1)[..., :m, :n]
        meant[name] = stored[name].astype(np.float32) * spread
    return stored, meant


@pytest.mark.parametrize(
    ("block", "fused", "shards"),
    [((128, 128), False, 1), ((8, 5), False, 5), ((8, 5), True, 1)],
)
def test_fp8_is_what_it_means(
    block: tuple[int, int],
    fused: bool,
    shards: int,
    rng: np.random.Generator,
    write_checkpoint: WriteCheckpoint,
) -> None:
    # Sizes beyond one default block, and no multiples of it.
    wide = V3 | {"hidden_size": 150, "intermediate_size": 260, "kv_lora_rank": 131}
    tensors = hf_tensors(wide, rng)
    stored, meant = quantize(fuse_experts(wide, tensors) if fused else tensors, block, rng)
    settings: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3"}
    if block != (128, 128):
        settings["weight_block_size"] = list(block)
    hf = wide | {"quantization_config": settings}
    expected_path = write_checkpoint(wide, meant, name="meant")
    expected = load_checkpoint(expected_path)
    path = write_checkpoint(hf, stored, name="fp8", shards=shards)
    assert_same(load_checkpoint(path, dtype="float32"), expected)
    rounded = load_checkpoint(expected_path, dtype="bfloat16")
    assert_same(load_checkpoint(path), rounded)


# --- Tensors that are no part of the decoder.


def test_what_is_no_part_of_the_decoder_is_ignored(
    rng: np.random.Generator, write_checkpoint: WriteCheckpoint
) -> None:
    tensors = hf_tensors(TIED, rng)
    expected = load_checkpoint(write_checkpoint(TIED, tensors, name="plain"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["model.layers.2.eh_proj.weight"] = np.full((3, 3), np.nan, np.float32)
    tensors["model.layers.3.enorm.weight"] = np.ones(3, np.int64)
    tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"] = np.ones((0, 20), np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    hf = TIED | {"num_nextn_predict_layers": 2}
    assert_same(load_checkpoint(write_checkpoint(hf, tensors, name="more")), expected)


# --- Memory.


def test_the_host_holds_about_one_tensor(
    rng: np.random.Generator, write_checkpoint: WriteCheckpoint
) -> None:
    hf = V3 | {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 5,
        "first_k_dense_replace": 3,
    }
    tensors = hf_tensors(hf, rng)
    largest = max(tensor.nbytes for tensor in tensors.values())
    whole = sum(tensor.nbytes for tensor in tensors.values())
    one_layer = sum(tensors[name].nbytes for name in tensors if ".layers.0." in name)
    # JAX may let go of the last tensor only when it is handed the next.
    limit = 2.5 * largest
    assert limit < one_layer < whole / 4
    one = write_checkpoint(hf, tensors, name="one")
    two = write_checkpoint(hf, tensors, name="two", shards=2)
    del tensors
    for path in (one, two):
        load_checkpoint(path)  # traced and compiled, so that only reading remains
        gc.collect()
        live = sum(array.nbytes for array in jax.live_arrays())
        tracemalloc.start()
        try:
            model = load_checkpoint(path)
            gc.collect()
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < limit, f"{peak=} {held=} {largest=} {whole=}"
        # and nothing but the model stays on the device
        assert sum(array.nbytes for array in jax.live_arrays()) - live == whole
        del model
