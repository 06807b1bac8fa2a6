"""Multi-head Latent Attention for JAX: modules, a paged latent cache, and decode kernels."""

from mla_jax import flash_mla, megakernel, nn, reference, sharding
from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.cache import PagedLatentCache
from mla_jax.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig, presets
from mla_jax.generate import generate
from mla_jax.indexer import lightning_indexer
from mla_jax.logit_shift import logit_shift
from mla_jax.nn import MLA, Decoder, decode_step, prefill
from mla_jax.paged import mla_paged_decode, mla_paged_prefill, mla_ragged_prefill
from mla_jax.quantization import QuantizedLatents, dequantize_cache, quantize_cache
from mla_jax.sparse import mla_sparse_decode, mla_sparse_prefill
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
    "QuantizedLatents",
    "YarnConfig",
    "decode_step",
    "dequantize_cache",
    "flash_mla",
    "generate",
    "lightning_indexer",
    "load_checkpoint",
    "logit_shift",
    "megakernel",
    "merge_states",
    "mla_paged_decode",
    "mla_paged_prefill",
    "mla_ragged_prefill",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "nn",
    "prefill",
    "presets",
    "quantize_cache",
    "reference",
    "save_checkpoint",
    "sharding",
]
