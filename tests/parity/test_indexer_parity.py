"""The indexer against transformers' of DeepseekV32, which neither transforms nor rounds to fp8.

Rounding moves scores by about a percent, so keys near the last place may change; the rest must not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from mla_jax import MLAConfig
from mla_jax.nn import Indexer
from mla_jax.rope import rotation

# Warnings of libraries that only the reference uses.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not hasattr(transformers, "DeepseekV32Config"),
        reason=f"transformers {transformers.__version__} has no DeepseekV32",
    ),
]

TOKENS, TOPK = 300, 64
SIZES: dict[str, Any] = {
    "q_lora_rank": 40,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": TOPK,
}
ALIKE = 0.93
"""Of the chosen keys, on average; a rotation by pairs leaves 56 % alike."""


def choice_of_transformers(x, q_lora, weights: dict[str, np.ndarray]) -> np.ndarray:
    """[tokens, topk] of one causal sequence; the first rows hold keys that they do not see."""
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as theirs

    config = transformers.DeepseekV32Config(
        hidden_size=48, num_hidden_layers=1, qk_rope_head_dim=64, **SIZES
    )
    indexer = theirs.DeepseekV32Indexer(config, layer_idx=0).float()
    indexer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    rotary = theirs.DeepseekV32RotaryEmbedding(config)
    positions = torch.arange(TOKENS)[None]
    hidden, latent = torch.tensor(x)[None], torch.tensor(q_lora)[None]
    rope = rotary(hidden, positions)
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None]
    return indexer(hidden, latent, rope, mask, positions)[0].numpy()


def test_the_same_keys(rng):
    config = MLAConfig(dim=48, n_heads=2, dtype="float32", **SIZES)
    indexer = Indexer(config, rngs=nnx.Rngs(0))
    state = nnx.state(indexer)
    weights = {}
    for path, variable in nnx.to_flat_state(state):
        fan_in = variable.shape[-1] if len(variable.shape) > 1 else 4
        value = rng.standard_normal(variable.shape).astype(np.float32) / np.sqrt(fan_in)
        variable.set_value(jnp.asarray(value))
        weights[".".join(map(str, path))] = value
    nnx.update(indexer, state)
    x, q_lora = (rng.standard_normal((TOKENS, n)).astype(np.float32) for n in (48, 40))

    want = choice_of_transformers(x, q_lora, weights)
    rope = rotation(config, jnp.arange(TOKENS)[None])
    got = np.asarray(jax.jit(indexer)(jnp.asarray(x)[None], jnp.asarray(q_lora)[None], rope))[0]
    common = []
    for position in range(TOKENS):
        seen = [key for key in want[position] if key <= position]
        ours = got[position][got[position] >= 0]
        if position < TOPK:
            assert set(ours.tolist()) == set(range(position + 1))
        else:
            common.append(np.isin(ours, seen).mean())
    assert np.mean(common) >= ALIKE
