"""A Hugging Face config.json, read into our names with refusals by name, and written."""

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mla_jax.config import ModelConfig, YarnConfig

_ROUTING = {
    "deepseek_v2": {"score": "softmax", "methods": ("greedy", "group_limited_greedy")},
    "deepseek_v3": {"score": "sigmoid", "methods": ("noaux_tc",)},
    "deepseek_v32": {"score": "sigmoid", "methods": ("noaux_tc",)},
}
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
# Keys whose other values change the computation in a way that is not built here.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
}


def _refuse(key: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"config.json: {key} = {got!r} is not supported, expected {expected}")


def _get(config: dict, key: str, default: Any) -> Any:
    """The value of `key`; absent and null are the default, or an error if there is none."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"config.json: missing key {key!r}")
    return value


def _integer(config: dict, key: str, default: int | None = None) -> int:
    value = _get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(key, value, "an integer")
    return value


def _real(config: dict, key: str, default: float | None = None) -> float:
    value = _get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(key, value, "a number")
    return float(value)


def _rope(config: dict) -> tuple[float, dict | None]:
    """(theta, YarnConfig keywords or None), from `rope_parameters` or `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        _refuse("rope_parameters", rope, "an object")
    theta = _real(rope, "rope_theta", _real(config, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        _refuse("rope type", kind, "'default' or 'yarn'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    given = rope.get("attention_factor") is not None
    return theta, {
        "factor": _real(rope, "factor"),
        "original_max_position": _integer(
            rope, "original_max_position_embeddings", _integer(config, "max_position_embeddings")
        ),
        # zero means "not given" for both betas, as it does for both mscales
        "beta_fast": _real(rope, "beta_fast", 0.0) or 32.0,
        "beta_slow": _real(rope, "beta_slow", 0.0) or 1.0,
        "mscale": _real(rope, "mscale", 0.0),
        "mscale_all_dim": _real(rope, "mscale_all_dim", 0.0),
        "attention_factor": _real(rope, "attention_factor") if given else None,
        "truncate": bool(rope.get("truncate", True)),
    }


def _experts(config: dict, model_type: str) -> dict:
    rule = _ROUTING[model_type]
    score = config.get("scoring_func", rule["score"])
    if score != rule["score"]:
        _refuse("scoring_func", score, f"{rule['score']!r} for {model_type}")
    method = config.get("topk_method") or rule["methods"][0]
    if method not in rule["methods"]:
        _refuse("topk_method", method, " or ".join(map(repr, rule["methods"])))
    normalize = bool(config.get("norm_topk_prob", model_type != "deepseek_v2"))
    if model_type == "deepseek_v2" and normalize:
        _refuse("norm_topk_prob", normalize, "False for deepseek_v2")
    grouped = method != "greedy"
    return {
        "n_routed": _integer(config, "n_routed_experts"),
        "n_active": _integer(config, "num_experts_per_tok"),
        "inter_dim": _integer(config, "moe_intermediate_size"),
        "n_shared": _integer(config, "n_shared_experts", 0),
        "n_groups": _integer(config, "n_group") if grouped else 1,
        "n_limited_groups": _integer(config, "topk_group") if grouped else 1,
        "score": score,
        "normalize": normalize,
        "route_scale": _real(config, "routed_scaling_factor", 1.0),
    }


def _indexer(config: dict, n_layers: int, n_dense: int) -> dict[str, int]:
    """The sizes of deepseek_v32's indexer; refuses layers that differ from one another in it.

    Further keys, of other models' indexers, would change the choice: which layers share one, how
    the indexer rotates.
    """
    for key, value in config.items():
        if key.startswith("index") and key not in _INDEXER and value:
            _refuse(key, value, f"none but {', '.join(_INDEXER)} of an indexer's keys")
    sparse = n_layers - n_dense
    kinds = {
        "layer_types": (["indexed_attention"] * n_layers, f"{n_layers} times indexed_attention"),
        "mlp_layer_types": (
            ["dense"] * n_dense + ["sparse"] * sparse,
            f"{n_dense} times dense, then {sparse} times sparse",
        ),
    }
    for key, (kind, words) in kinds.items():
        if config.get(key) not in (None, kind):
            _refuse(key, config[key], words)
    sizes = {key: _integer(config, key) for key in _INDEXER}
    if sizes["index_n_heads"] < 1:
        _refuse("index_n_heads", sizes["index_n_heads"], "a positive integer")
    return sizes


def _tokens(config: dict, key: str) -> tuple[int, ...]:
    """No token, one, or a list of them."""
    value = config.get(key)
    tokens = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        _refuse(key, value, "a token, a list of tokens or null")
    return tuple(tokens)


def parse_hf(config: dict) -> dict[str, Any]:
    """`config.json` -> {ModelConfig fields, "mla", "moe", "yarn": keywords of their configs}."""
    model_type = config.get("model_type")
    if model_type not in _ROUTING:
        _refuse("model_type", model_type, " or ".join(map(repr, _ROUTING)))
    for key, value in _ONLY.items():
        if config.get(key, value) != value:
            _refuse(key, config[key], repr(value))
    n_heads = _integer(config, "num_attention_heads")
    # Every head has its own keys, expanded from the latent; a number above n_heads is the default
    # of a config class that was told only the heads, and means nothing.
    if _integer(config, "num_key_value_heads", n_heads) < n_heads:
        _refuse("num_key_value_heads", config["num_key_value_heads"], f"{n_heads}, one a head")
    if model_type != "deepseek_v3" and not config.get("rope_interleave", True):
        _refuse("rope_interleave", False, f"True for {model_type}")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        _refuse("dtype", dtype, "'float32', 'bfloat16' or 'float16'")

    theta, yarn = _rope(config)
    n_layers = _integer(config, "num_hidden_layers")
    n_dense = min(_integer(config, "first_k_dense_replace", 0), n_layers)
    return {
        "vocab": _integer(config, "vocab_size"),
        "n_layers": n_layers,
        "inter_dim": _integer(config, "intermediate_size"),
        "n_dense": n_dense,
        "max_seq_len": _integer(config, "max_position_embeddings"),
        "norm_eps": _real(config, "rms_norm_eps", 1e-6),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "bos_id": next(iter(_tokens(config, "bos_token_id")), None),
        "eos_ids": _tokens(config, "eos_token_id"),
        "yarn": yarn,
        "moe": _experts(config, model_type) if n_dense < n_layers else None,
        "mla": {
            "dim": _integer(config, "hidden_size"),
            "n_heads": n_heads,
            "q_lora_rank": _integer(config, "q_lora_rank", 0),
            "kv_lora_rank": _integer(config, "kv_lora_rank"),
            "qk_nope_head_dim": _integer(config, "qk_nope_head_dim"),
            "qk_rope_head_dim": _integer(config, "qk_rope_head_dim"),
            "v_head_dim": _integer(config, "v_head_dim"),
            "rope_theta": theta,
            "rope_interleave": bool(config.get("rope_interleave", True)),
            **(_indexer(config, n_layers, n_dense) if model_type == "deepseek_v32" else {}),
            "dtype": dtype,
        },
    }


def _format_rope(theta: float, yarn: "YarnConfig | None") -> dict[str, Any]:
    if yarn is None:
        return {"rope_type": "default", "rope_theta": theta}
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }
    optional = {
        "mscale": yarn.mscale or None,
        "mscale_all_dim": yarn.mscale_all_dim or None,
        "attention_factor": yarn.attention_factor,
    }
    return rope | {key: value for key, value in optional.items() if value is not None}


def _format_experts(config: "ModelConfig") -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {"first_k_dense_replace": config.n_layers}
    method = "noaux_tc"
    if moe.score == "softmax":
        method = "greedy" if moe.n_groups == 1 else "group_limited_greedy"
        if moe.normalize:
            raise ValueError("normalize: got True with softmax routing, which deepseek_v2 has not")
        if config.mla.index_n_heads:
            raise ValueError("score: got 'softmax' with an indexer, which deepseek_v32 has not")
    return {
        "first_k_dense_replace": config.n_dense,
        "n_routed_experts": moe.n_routed,
        "n_shared_experts": moe.n_shared,
        "num_experts_per_tok": moe.n_active,
        "moe_intermediate_size": moe.inter_dim,
        "n_group": moe.n_groups,
        "topk_group": moe.n_limited_groups,
        "scoring_func": moe.score,
        "topk_method": method,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.route_scale,
    }


def format_hf(config: "ModelConfig") -> dict[str, Any]:
    """The `config.json` that `parse_hf` reads back as this model, and transformers too."""
    mla, moe = config.mla, config.moe
    model_type, indexer = "deepseek_v3", {}
    if mla.index_n_heads:
        model_type, indexer = "deepseek_v32", {key: getattr(mla, key) for key in _INDEXER}
    elif moe is not None and moe.score == "softmax":
        model_type = "deepseek_v2"
    if model_type != "deepseek_v3" and not mla.rope_interleave:
        why = "softmax routing" if model_type == "deepseek_v2" else "an indexer"
        raise ValueError(f"rope_interleave: got False, which {model_type} ({why}) has not")
    eos = list(config.eos_ids)
    return {
        "architectures": [f"Deepseek{model_type.split('_')[1].upper()}ForCausalLM"],
        "model_type": model_type,
        "dtype": config.dtype,
        "vocab_size": config.vocab,
        "hidden_size": mla.dim,
        "intermediate_size": config.inter_dim,
        "num_hidden_layers": config.n_layers,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": mla.n_heads,
        "num_key_value_heads": mla.n_heads,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        **indexer,
        **_format_experts(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_interleave": mla.rope_interleave,
        "rope_parameters": _format_rope(mla.rope_theta, mla.yarn),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
