"""Rotary position embedding: interleaved pairs or halves, with YaRN's frequencies.

Tables are computed for the positions at hand, in float32: no table of the longest context is held.
Sources: RoFormer (arXiv:2104.09864), YaRN (arXiv:2309.00071), DeepSeek-V2 (arXiv:2405.04434).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_jax.config import MLAConfig, YarnConfig


def _yarn_bounds(yarn: YarnConfig, rope_dim: int, theta: float) -> tuple[float, float]:
    """The dimension pairs between which YaRN goes from extrapolation to interpolation."""

    def pair_with(rotations: float) -> float:
        wavelengths = yarn.original_max_position / (2 * math.pi * rotations)
        return rope_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, rope_dim - 1.0)
    return low, high + 0.001 if low == high else high


def frequencies(rope_dim: int, theta: float, yarn: YarnConfig | None = None) -> np.ndarray:
    """Radians a position for each of the rope_dim/2 pairs: float32 [rope_dim / 2].

    >>> frequencies(4, 10000.0)
    array([1.  , 0.01], dtype=float32)
    """
    pairs = np.arange(rope_dim // 2, dtype=np.float64)
    freqs = theta ** (-2 * pairs / rope_dim)
    if yarn is not None:
        low, high = _yarn_bounds(yarn, rope_dim, theta)
        interpolated = np.clip((pairs - low) / (high - low), 0, 1)
        freqs = freqs / yarn.factor * interpolated + freqs * (1 - interpolated)
    return freqs.astype(np.float32)


def rotation(
    config: MLAConfig, positions: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch half_rope"], Float[Array, "*batch half_rope"]]:
    """(cos, sin) of every pair's angle at `positions`, float32 [..., rope_dim / 2]."""
    freqs = frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn)
    angles = positions.astype(jnp.float32)[..., None] * freqs
    factor = config.yarn.rotation_factor if config.yarn else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(
    x: Float[Array, "*dims rope"],
    cos: Float[Array, "*#dims half_rope"],
    sin: Float[Array, "*#dims half_rope"],
    *,
    interleave: bool = True,
) -> Float[Array, "*dims rope"]:
    """Rotate each pair of `x` by its angle, in float32; the result has x's dtype.

    `interleave` True pairs (x[2i], x[2i+1]); False pairs (x[i], x[i + rope/2]).
    """
    x32 = x.astype(jnp.float32)
    if interleave:
        even, odd = x32[..., 0::2], x32[..., 1::2]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return rotated.reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x32, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
