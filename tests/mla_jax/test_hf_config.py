"""config.json: Hugging Face's two spellings, refusals by name, and what is written."""

import dataclasses
import json
from typing import Any

import pytest

from mla_jax import ModelConfig, YarnConfig, presets

# As the models' own config.json files have it.
HF_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
HF_V2 = HF_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "q_lora_rank": 1536,
}
HF_V3 = HF_V2 | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": HF_V2["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
HF_V32 = HF_V3 | {
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
YARN_0707 = YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)


def with_mla(config: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, mla=dataclasses.replace(config.mla, **changes))


def test_the_released_configs_are_the_presets() -> None:
    assert ModelConfig.from_hf(HF_V2_LITE) == presets["deepseek-v2-lite"]
    assert ModelConfig.from_hf(HF_V2) == with_mla(presets["deepseek-v2"], yarn=YARN_0707)
    assert ModelConfig.from_hf(HF_V3) == presets["deepseek-v3"]
    assert ModelConfig.from_hf(HF_V32) == presets["deepseek-v3.2"]


@pytest.mark.parametrize("hf", [HF_V2_LITE, HF_V2, HF_V3], ids=["v2-lite", "v2", "v3"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_spellings_of_rope(hf: dict[str, Any], kind: str) -> None:
    scaling = dict(hf["rope_scaling"])
    del scaling["type"]
    rest = {key: value for key, value in hf.items() if not key.startswith("rope_")}
    newer = rest | {"rope_parameters": scaling | {kind: "yarn", "rope_theta": 10000.0}}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(hf)


def test_rope_without_yarn() -> None:
    plain = HF_V3 | {"rope_scaling": None, "rope_theta": 5000}
    assert ModelConfig.from_hf(plain) == with_mla(
        presets["deepseek-v3"], yarn=None, rope_theta=5000.0
    )
    newer = {key: value for key, value in plain.items() if not key.startswith("rope_")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(plain)


def test_layers_of_a_model_with_an_indexer() -> None:
    """What transformers writes of them, and what changes nothing when it is false."""
    layers = {
        "layer_types": ["indexed_attention"] * 61,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
        "indexer_rope_interleave": False,
    }
    assert ModelConfig.from_hf(HF_V32 | layers) == presets["deepseek-v3.2"]
    sizes = {"index_n_heads": 3, "index_head_dim": 64, "index_topk": 128}
    mla = ModelConfig.from_hf(HF_V32 | sizes).mla
    assert (mla.index_n_heads, mla.index_head_dim, mla.index_topk) == (3, 64, 128)


def test_yarn_is_on_by_its_type_and_not_by_length() -> None:
    short = ModelConfig.from_hf(HF_V3 | {"max_position_embeddings": 128})
    assert short.mla.yarn == presets["deepseek-v3"].mla.yarn


def test_settings_of_yarn() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 8,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 0.25,
        "truncate": False,
    }
    hf = HF_V3 | {"rope_scaling": scaling, "max_position_embeddings": 512}
    assert ModelConfig.from_hf(hf).mla.yarn == YarnConfig(
        factor=8.0,
        original_max_position=512,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=0.25,
        truncate=False,
    )


def test_sizes_that_are_no_powers_of_two() -> None:
    sizes = {
        "hidden_size": 90,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 21,
        "kv_lora_rank": 33,
        "qk_nope_head_dim": 11,
        "qk_rope_head_dim": 6,
        "v_head_dim": 13,
    }
    mla = ModelConfig.from_hf(HF_V3 | sizes | {"rope_interleave": False}).mla
    assert (mla.dim, mla.n_heads, mla.q_lora_rank, mla.kv_lora_rank) == (90, 5, 21, 33)
    assert (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (11, 6, 13)
    assert not mla.rope_interleave


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("eos_token_id", [1, 7], "eos_ids", (1, 7)),
        ("eos_token_id", None, "eos_ids", ()),
        ("bos_token_id", None, "bos_id", None),
        ("tie_word_embeddings", True, "tie_embeddings", True),
        ("rms_norm_eps", 1e-5, "norm_eps", 1e-5),
        ("first_k_dense_replace", None, "n_dense", 0),
        ("first_k_dense_replace", 61, "moe", None),
        ("torch_dtype", "float16", "dtype", "float16"),
        # what transformers writes for a model that was given its heads alone
        ("num_key_value_heads", 512, "n_layers", 61),
    ],
)
def test_keys(key: str, value: object, field: str, expected: object) -> None:
    assert getattr(ModelConfig.from_hf(HF_V3 | {key: value}), field) == expected


def test_the_newer_spelling_of_dtype_wins() -> None:
    assert ModelConfig.from_hf(HF_V3 | {"dtype": "float32"}).dtype == "float32"


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (HF_V3, {"model_type": "qwen3"}, "model_type = 'qwen3'"),
        (HF_V3, {"model_type": None}, "model_type = None"),
        (HF_V3, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (HF_V3, {"attention_bias": True}, "attention_bias = True"),
        (HF_V2, {"mlp_bias": True}, "mlp_bias = True"),
        (HF_V3, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (HF_V3, {"num_key_value_heads": 8}, "num_key_value_heads = 8"),
        (HF_V3, {"torch_dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'"),
        (HF_V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (HF_V3, {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        (HF_V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        (HF_V2, {"norm_topk_prob": True}, "norm_topk_prob = True"),
        (HF_V2, {"rope_interleave": False}, "rope_interleave = False"),
        (HF_V3, {"rope_scaling": {"type": "llama3"}}, "rope type = 'llama3'"),
        (HF_V3, {"rope_scaling": {"type": "yarn"}}, "missing key 'factor'"),
        (HF_V3, {"rope_scaling": "yarn"}, "rope_parameters = 'yarn'"),
        (
            HF_V3,
            {"rope_scaling": HF_V3["rope_scaling"] | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        (HF_V3, {"kv_lora_rank": None}, "missing key 'kv_lora_rank'"),
        (HF_V3, {"n_routed_experts": None}, "missing key 'n_routed_experts'"),
        (HF_V3, {"n_group": None}, "missing key 'n_group'"),
        (HF_V3, {"num_attention_heads": "128"}, "num_attention_heads = '128'"),
        (HF_V3, {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (HF_V3, {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        (HF_V3, {"eos_token_id": ["end"]}, r"eos_token_id = \['end'\]"),
        (HF_V3, {"bos_token_id": 0.5}, "bos_token_id = 0.5"),
        (HF_V3, {"eos_token_id": 129280}, "eos_ids: got 129280"),
        (HF_V3, {"topk_group": 9}, "n_limited_groups: got 9"),
        (HF_V32, {"index_topk": None}, "missing key 'index_topk'"),
        (HF_V32, {"index_n_heads": 0}, "index_n_heads = 0"),
        (HF_V32, {"index_topk": 100}, "index_topk: got 100"),
        (HF_V32, {"index_head_dim": 96}, "index_head_dim: got 96"),
        (HF_V32, {"q_lora_rank": None}, "q_lora_rank: got 0 with an indexer"),
        (HF_V32, {"rope_interleave": False}, "rope_interleave = False"),
        (HF_V32, {"indexer_rope_interleave": True}, "indexer_rope_interleave = True"),
        (HF_V32, {"index_topk_freq": 4}, "index_topk_freq = 4"),
        (HF_V32, {"layer_types": ["full_attention"] * 61}, "layer_types = .*61 times indexed_att"),
        (
            HF_V32,
            {"mlp_layer_types": ["sparse"] * 61},
            "mlp_layer_types = .*3 times dense, then 58",
        ),
    ],
)
def test_refused_by_name(base: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ModelConfig.from_hf(base | changes)
    assert "\n" not in str(caught.value)


# --- Written and read back.


def variations() -> dict[str, ModelConfig]:
    tiny = presets["tiny"]
    assert tiny.moe is not None
    softmax = dataclasses.replace(tiny.moe, score="softmax", normalize=False, route_scale=3.0)
    grouped = dataclasses.replace(softmax, n_groups=2, n_limited_groups=1)
    sigmoid = dataclasses.replace(tiny.moe, n_groups=2, n_limited_groups=2, normalize=False)
    return presets | {
        "softmax": dataclasses.replace(tiny, moe=softmax),
        "grouped": dataclasses.replace(tiny, moe=grouped),
        "unnormalised": dataclasses.replace(tiny, moe=sigmoid),
        "dense": dataclasses.replace(tiny, moe=None, n_dense=tiny.n_layers),
        "tied": dataclasses.replace(tiny, tie_embeddings=True, eos_ids=(), bos_id=None),
        "ends": dataclasses.replace(tiny, eos_ids=(3, 5), norm_eps=1e-5),
        "halves": with_mla(tiny, rope_interleave=False, q_lora_rank=0, rope_theta=77.0),
        "one-mscale": with_mla(tiny, yarn=YarnConfig(factor=2.0, mscale=0.3)),
        "factor": with_mla(
            tiny,
            yarn=YarnConfig(
                factor=2.5,
                original_max_position=100,
                beta_fast=9.0,
                beta_slow=2.0,
                mscale_all_dim=0.5,
                attention_factor=1.5,
                truncate=False,
            ),
        ),
    }


@pytest.mark.parametrize("name", variations())
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_and_read_back(name: str, dtype: str) -> None:
    config = variations()[name].replace_dtype(dtype)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_the_model_type_follows_the_routing() -> None:
    assert presets["deepseek-v2"].to_hf()["model_type"] == "deepseek_v2"
    assert presets["deepseek-v3"].to_hf()["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "index_topk" not in presets["deepseek-v3"].to_hf()
    assert presets["deepseek-v3.2"].to_hf()["model_type"] == "deepseek_v32"
    assert presets["deepseek-v3.2"].to_hf()["architectures"] == ["DeepseekV32ForCausalLM"]


def test_what_a_model_type_cannot_say() -> None:
    softmax = variations()["softmax"]
    with pytest.raises(ValueError, match="rope_interleave: got False"):
        with_mla(softmax, rope_interleave=False).to_hf()
    assert softmax.moe is not None
    normalized = dataclasses.replace(softmax.moe, normalize=True)
    with pytest.raises(ValueError, match="normalize: got True"):
        dataclasses.replace(softmax, moe=normalized).to_hf()
    with pytest.raises(ValueError, match="score: got 'softmax' with an indexer"):
        with_mla(softmax, index_n_heads=4).to_hf()
    with pytest.raises(ValueError, match=r"rope_interleave: got False, which deepseek_v32"):
        with_mla(presets["deepseek-v3.2"], rope_interleave=False).to_hf()
