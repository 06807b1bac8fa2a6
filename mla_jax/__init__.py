"""Multi-head Latent Attention for JAX: modules, a paged latent cache, and decode kernels."""

from mla_jax import nn, reference
from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.cache import PagedLatentCache
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig, presets
from mla_jax.nn import MLA, Decoder, decode_step, prefill

__all__ = [
    "MLA",
    "Decoder",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "OutOfPagesError",
    "PageAllocator",
    "PagedLatentCache",
    "YarnConfig",
    "decode_step",
    "nn",
    "prefill",
    "presets",
    "reference",
]
