"""Oracles in plain `jnp`: slow, step by step, and independent of everything they check."""

from mla_jax.reference.flash_mla import (
    ref_flash_mla_pool,
    ref_flash_mla_prefill,
    ref_flash_mla_with_kvcache,
    ref_mha_fwd_kvcache,
)
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
    "ref_flash_mla_pool",
    "ref_flash_mla_prefill",
    "ref_flash_mla_with_kvcache",
    "ref_kernel",
    "ref_layer",
    "ref_mha_fwd_kvcache",
    "yarn_correction_range",
]
