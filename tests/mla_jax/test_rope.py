"""Rotary embedding against complex multiplication in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import MLAConfig, YarnConfig
from mla_jax.rope import apply_rotary, frequencies, rotation

DEEPSEEK = YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
YARNS = {
    "none": None,
    "deepseek": DEEPSEEK,
    "short": YarnConfig(factor=4.0, original_max_position=100, mscale=0.5, mscale_all_dim=1.0),
    "steep": YarnConfig(factor=8.0, original_max_position=64, beta_fast=1.5, beta_slow=1.5),
    "exact": dataclasses.replace(DEEPSEEK, truncate=False, attention_factor=0.7),
}


def oracle_frequencies(dim: int, base: float, yarn: YarnConfig | None) -> np.ndarray:
    """One pair at a time, as the paper and the models' code have it, in float64."""
    freqs = []
    for i in range(dim // 2):
        freq = 1 / base ** (2 * i / dim)
        if yarn is not None:
            lo, hi = (
                dim * math.log(yarn.original_max_position / (2 * math.pi * turns))
                / (2 * math.log(base))
                for turns in (yarn.beta_fast, yarn.beta_slow)
            )  # fmt: skip
            if yarn.truncate:
                lo, hi = math.floor(lo), math.ceil(hi)
            lo, hi = max(lo, 0), min(hi, dim - 1)
            hi += 0.001 * (lo == hi)
            ramp = min(max((i - lo) / (hi - lo), 0), 1)
            freq = freq / yarn.factor * ramp + freq * (1 - ramp)
        freqs.append(freq)
    return np.array(freqs)


def oracle_rotate(x: np.ndarray, angles: np.ndarray, factor: float, interleave: bool) -> np.ndarray:
    half = x.shape[-1] // 2
    real, imaginary = (x[..., ::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    z = (real + 1j * imaginary) * np.exp(1j * angles) * factor
    if interleave:
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    return np.concatenate([z.real, z.imag], axis=-1)


def config(yarn: YarnConfig | None = None, rope: int = 64, theta: float = 10000.0) -> MLAConfig:
    return MLAConfig(
        dim=32, n_heads=2, qk_rope_head_dim=rope, rope_theta=theta, yarn=yarn, dtype="float32"
    )


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
@pytest.mark.parametrize(("dim", "base"), [(64, 10000.0), (6, 10000.0), (20, 500.0), (2, 10.0)])
def test_frequencies(yarn: YarnConfig | None, dim: int, base: float) -> None:
    got = frequencies(dim, base, yarn)
    assert got.dtype == np.float32
    assert got.shape == (dim // 2,)
    np.testing.assert_allclose(got, oracle_frequencies(dim, base, yarn), rtol=1e-6)


def test_yarn_goes_from_pair_10_to_pair_23_at_deepseeks_sizes() -> None:
    plain = frequencies(64, 10000.0)
    ratio = frequencies(64, 10000.0, DEEPSEEK) / plain
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)
    # linear between the two, so that neither bound can be another
    expected = 1 - (np.arange(10, 24) - 10) / 13 * (1 - 1 / 40)
    np.testing.assert_allclose(ratio[10:24], expected, rtol=1e-6)


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("rope", [64, 10])
def test_rotation_is_complex_multiplication(
    yarn: YarnConfig | None, interleave: bool, rope: int, rng: np.random.Generator
) -> None:
    positions = rng.integers(0, 200_000, (3, 5)).astype(np.int32)
    positions[0, 0] = 0
    x = rng.standard_normal((3, 5, 4, rope)).astype(np.float32)
    factor = yarn.rotation_factor if yarn else 1.0

    cos, sin = rotation(config(yarn, rope), jnp.asarray(positions))
    assert cos.shape == sin.shape == (3, 5, rope // 2)
    assert cos.dtype == sin.dtype == jnp.float32
    got = apply_rotary(jnp.asarray(x), cos[..., None, :], sin[..., None, :], interleave=interleave)

    angles = positions[..., None, None] * oracle_frequencies(rope, 10000.0, yarn)
    expected = oracle_rotate(x.astype(np.float64), angles, factor, interleave)
    # float32 rounds a frequency and an angle, 2^-24 of it each, and the rotation a few times.
    tolerance = factor * np.abs(x).max() * (angles.max(axis=-1, keepdims=True) * 2**-23 + 2**-20)
    assert (np.abs(np.asarray(got) - expected) <= tolerance).all()


def test_halves_are_pairs_in_another_order(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((7, 10)), jnp.float32)
    cos, sin = rotation(config(rope=10), jnp.arange(7))
    order = np.arange(10).reshape(5, 2).T.reshape(-1)
    np.testing.assert_allclose(
        np.asarray(apply_rotary(x[:, order], cos, sin, interleave=False)),
        np.asarray(apply_rotary(x, cos, sin))[:, order],
        rtol=1e-6,
        atol=1e-6,
    )


def test_scores_depend_on_distance_alone(rng: np.random.Generator) -> None:
    q, k = rng.standard_normal((2, 64)).astype(np.float32)

    def score(q_position: int, k_position: int) -> float:
        cos, sin = rotation(config(), jnp.array([q_position, k_position]))
        rotated = np.asarray(apply_rotary(jnp.asarray(np.stack([q, k])), cos, sin), np.float64)
        return rotated[0] @ rotated[1]

    for shift in (1, 50, 900):
        assert score(17 + shift, 5 + shift) == pytest.approx(score(17, 5), abs=2e-2)
    assert score(0, 0) == pytest.approx(float(q.astype(np.float64) @ k), abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_once_to_the_inputs_dtype(dtype: str, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((6, 64)).astype(np.float32)).astype(dtype)
    cos, sin = rotation(config(), jnp.arange(6) * 100)
    got = apply_rotary(x, cos, sin)
    assert got.dtype == dtype
    exact = apply_rotary(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(exact.astype(dtype)))


def test_cos_and_sin_carry_the_rotation_factor() -> None:
    plain = rotation(config(YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)), jnp.arange(9))
    # only one of the two mscales: the factor is g(1)
    scaled = rotation(config(YarnConfig(factor=40.0, mscale_all_dim=1.0)), jnp.arange(9))
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(np.asarray(a) * 1.3688879454, np.asarray(b), rtol=1e-6)
