"""Multi-head Latent Attention for JAX: modules, a paged latent cache, and decode kernels."""

from mla_jax import flash_mla, megakernel, nn, reference, sharding
from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.cache import PagedLatentCache
from mla_jax.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig, presets
from mla_jax.generate import generate
from mla_jax.nn import MLA, Decoder, decode_step, prefill
from mla_jax.paged import mla_paged_decode, mla_paged_prefill, mla_ragged_prefill
from pallas_kernels.merge import merge_states

__all__ = [
    "MLA",
    "CheckpointError",
    "Decoder",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "OutOfPagesError",
    "PageAllocator",
    "PagedLatentCache",
    "YarnConfig",
    "decode_step",
    "flash_mla",
    "generate",
    "load_checkpoint",
    "megakernel",
    "merge_states",
    "mla_paged_decode",
    "mla_paged_prefill",
    "mla_ragged_prefill",
    "nn",
    "prefill",
    "presets",
    "reference",
    "save_checkpoint",
    "sharding",
]
