"""Flax NNX modules of a DeepSeek-style decoder.

Legend: B batch, S tokens of this call, H heads, C kv_lora_rank, R qk_rope_head_dim,
N qk_nope_head_dim, V v_head_dim. Weights are [out, in], as in checkpoints.
"""

from mla_jax.nn.decoder import Decoder, decode_step, prefill
from mla_jax.nn.indexer import Indexer
from mla_jax.nn.mla import MLA

__all__ = ["MLA", "Decoder", "Indexer", "decode_step", "prefill"]
