"""Configurations: the models' numbers, their scales, and what each refuses to be."""

import dataclasses
from typing import Any

import pytest

from mla_jax import MLAConfig, ModelConfig, MoEConfig, YarnConfig, presets

YARN_0707 = YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)


@pytest.mark.parametrize(
    ("name", "sizes", "routing"),
    [
        (
            "deepseek-v2-lite",
            (2048, 27, 1, 102400, 16, 0, 10944),
            (1408, 64, 2, 6, 1, 1, "softmax", False, 1.0),
        ),
        (
            "deepseek-v2",
            (5120, 60, 1, 102400, 128, 1536, 12288),
            (1536, 160, 2, 6, 8, 3, "softmax", False, 16.0),
        ),
        (
            "deepseek-v3",
            (7168, 61, 3, 129280, 128, 1536, 18432),
            (2048, 256, 1, 8, 8, 4, "sigmoid", True, 2.5),
        ),
    ],
)
def test_presets_are_the_released_models(
    name: str, sizes: tuple[int, ...], routing: tuple[object, ...]
) -> None:
    config = presets[name]
    mla, moe = config.mla, config.moe
    assert moe is not None
    assert (
        *(mla.dim, config.n_layers, config.n_dense, config.vocab),
        *(mla.n_heads, mla.q_lora_rank, config.inter_dim),
    ) == sizes
    assert dataclasses.astuple(moe) == (
        *(routing[1], routing[3], routing[0], routing[2]),
        *routing[4:],
    )
    assert (mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) == (
        *(512, 128, 64, 128),
    )
    assert mla.qk_head_dim == 192
    assert mla.rope_interleave
    assert (mla.rope_theta, config.norm_eps, config.dtype) == (10000.0, 1e-6, "bfloat16")
    assert mla.yarn is not None
    assert (mla.yarn.factor, mla.yarn.original_max_position) == (40.0, 4096)
    assert (mla.yarn.beta_fast, mla.yarn.beta_slow) == (32.0, 1.0)
    assert mla.yarn.rotation_factor == 1.0
    dense = [layer for layer in range(config.n_layers) if not config.is_moe(layer)]
    assert dense == list(range(sizes[2]))


def test_the_tiny_preset_is_a_byte_model() -> None:
    tiny = presets["tiny"]
    assert tiny.vocab >= 256
    assert tiny.mla.n_heads in (4, 8)
    assert tiny.dtype == "float32"


@pytest.mark.parametrize(
    ("yarn", "expected"),
    [
        (None, 0.0721687836),
        (YARN_0707, 0.1147213868),
        (YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0), 0.1352337789),
        # the temperature is mscale_all_dim's alone
        (YarnConfig(factor=40.0, mscale=1.0), 0.0721687836),
        (YarnConfig(factor=40.0, mscale_all_dim=1.0), 0.1352337789),
    ],
)
def test_softmax_scales(yarn: YarnConfig | None, expected: float) -> None:
    config = MLAConfig(dim=64, n_heads=2, yarn=yarn)
    assert config.softmax_scale == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1.3688879454),
        ({"mscale": 1.0}, 1.3688879454),
        ({"mscale_all_dim": 0.707}, 1.3688879454),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.3688879454 / 1.2608037773),
        ({"mscale": 1.0, "mscale_all_dim": 0.707, "attention_factor": 0.5}, 0.5),
    ],
)
def test_rotation_factors(settings: dict[str, Any], expected: float) -> None:
    assert YarnConfig(factor=40.0, **settings).rotation_factor == pytest.approx(expected, abs=1e-9)


def test_the_presets_scales() -> None:
    scales = {name: config.mla.softmax_scale for name, config in presets.items()}
    assert scales["deepseek-v2-lite"] == pytest.approx(0.1147213868, abs=1e-10)
    assert scales["deepseek-v2"] == pytest.approx(0.1352337789, abs=1e-10)
    assert scales["deepseek-v3"] == pytest.approx(0.1352337789, abs=1e-10)
    assert scales["deepseek-v3.2"] == scales["deepseek-v3"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 0}, "dim: got 0"),
        ({"n_heads": -1}, "n_heads: got -1"),
        ({"n_heads": True}, "n_heads: got True"),
        ({"kv_lora_rank": 1.5}, "kv_lora_rank: got 1.5"),
        ({"q_lora_rank": -1}, "q_lora_rank: got -1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: got 63"),
        ({"v_head_dim": 0}, "v_head_dim: got 0"),
        ({"rope_theta": 1.0}, "rope_theta: got 1.0"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
    ],
)
def test_mla_config_validates_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MLAConfig(**dict[str, Any](dim=32, n_heads=2) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0.5}, "yarn factor: got 0.5"),
        ({"original_max_position": 0}, "original_max_position: got 0"),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "yarn betas"),
        ({"beta_slow": 0.0}, "yarn betas"),
    ],
)
def test_yarn_config_validates_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        YarnConfig(**dict[str, Any](factor=4.0) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_routed": 0}, "n_routed: got 0"),
        ({"n_shared": -1}, "n_shared: got -1"),
        ({"score": "tanh"}, "score: got 'tanh'"),
        ({"n_groups": 3}, "n_groups: got 3"),
        ({"n_groups": 2, "n_limited_groups": 3}, "n_limited_groups: got 3"),
        ({"n_groups": 4, "n_limited_groups": 1, "n_active": 3}, "n_active: got 3"),
        ({"n_groups": 8, "n_limited_groups": 8, "score": "sigmoid"}, "n_groups: got 8"),
    ],
)
def test_moe_config_validates_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig(**dict[str, Any](n_routed=8, n_active=2, inter_dim=4) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab": 0}, "vocab: got 0"),
        ({"n_layers": 0}, "n_layers: got 0"),
        ({"n_dense": 5}, "n_dense: got 5"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0"),
        ({"bos_id": 10}, "bos_id/eos_ids: got 10"),
        ({"eos_ids": (1, -2)}, "bos_id/eos_ids: got -2"),
    ],
)
def test_model_config_validates_itself(changes: dict[str, Any], words: str) -> None:
    mla = MLAConfig(dim=32, n_heads=2)
    small: dict[str, Any] = {"vocab": 10, "n_layers": 4, "inter_dim": 8, "mla": mla}
    with pytest.raises(ValueError, match=words):
        ModelConfig(**small | changes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**small).vocab = 3  # pyright: ignore[reportAttributeAccessIssue]
