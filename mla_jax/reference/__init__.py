"""Oracles in plain `jnp`: slow, step by step, and independent of everything they check."""

from mla_jax.reference.intermediates import MLAInput, ref_kernel
from mla_jax.reference.layer import (
    LayerTrace,
    LayerWeights,
    mla_softmax_scale,
    precompute_freqs_cis,
    ref_layer,
    yarn_correction_range,
)

__all__ = [
    "LayerTrace",
    "LayerWeights",
    "MLAInput",
    "mla_softmax_scale",
    "precompute_freqs_cis",
    "ref_kernel",
    "ref_layer",
    "yarn_correction_range",
]
