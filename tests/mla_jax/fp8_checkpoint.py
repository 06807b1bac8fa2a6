"""A checkpoint in FP8, and what a decoder makes of it in float64 NumPy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from fp8_weights import spread
from oracles import float64, routing

Tensors = dict[str, np.ndarray]

# Matrices of several blocks, most of them with ragged edges.
HF: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "vocab_size": 40,
    "hidden_size": 160,
    "intermediate_size": 272,
    "moe_intermediate_size": 144,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 136,
    "kv_lora_rank": 132,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 36,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "quantization_config": {"quant_method": "fp8"},
}
BF16_ONLY = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def in_fp8(
    tensors: Tensors, rng: np.random.Generator, block: tuple[int, int] = (128, 128)
) -> tuple[Tensors, Tensors]:
    """(tensors as DeepSeek's checkpoints have them, what they mean in float64)."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            stored[name], meant[name] = tensor, float64(tensor)
        elif tensor.ndim == 1 or name.endswith(BF16_ONLY):
            gain = 1 if tensor.ndim == 1 or "embed" in name else tensor.shape[-1] ** -0.5
            stored[name] = (tensor * gain).astype(jnp.bfloat16)
            meant[name] = float64(stored[name])
        else:
            *stack, m, n = tensor.shape
            grid = (*stack, -(-m // block[0]), -(-n // block[1]))
            scale = (rng.uniform(0.5, 2.0, grid) / np.sqrt(n)).astype(np.float32)
            stored[name], stored[name + "_scale_inv"] = tensor.astype(jnp.float8_e4m3fn), scale
            meant[name] = float64(stored[name]) * spread(float64(scale), block, tensor.shape)
    return stored, meant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
    """The decoder in float64, over the names of the checkpoint; `quantise` acts on activations."""

    hf: dict[str, Any]
    weights: Tensors
    quantise: Callable[[np.ndarray], np.ndarray]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.quantise(x) @ self.weights[name + ".weight"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        return x / rms * self.weights[name + ".weight"]

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """[time, heads, rope], pairs of neighbours as complex numbers."""
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    def attention(self, x: np.ndarray, at: str) -> np.ndarray:
        hf = self.hf
        heads, nope, latent = hf["num_attention_heads"], hf["qk_nope_head_dim"], hf["kv_lora_rank"]
        q = self.norm(self.linear(x, at + "q_a_proj"), at + "q_a_layernorm")
        q = self.linear(q, at + "q_b_proj").reshape(len(x), heads, -1)
        kv = self.linear(x, at + "kv_a_proj_with_mqa")
        ckv = self.norm(kv[:, :latent], at + "kv_a_layernorm")
        # Absorbed into queries and values: its products are not with quantised activations.
        expanded = (ckv @ self.weights[at + "kv_b_proj.weight"].T).reshape(len(x), heads, -1)
        k_pe = np.repeat(self.rotated(kv[:, None, latent:]), heads, axis=1)
        k = np.concatenate([expanded[..., :nope], k_pe], axis=-1)
        q = np.concatenate([q[..., :nope], self.rotated(q[..., nope:])], axis=-1)
        scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        out = np.einsum("hst,thv->shv", p, expanded[..., nope:])
        return self.linear(out.reshape(len(x), -1), at + "o_proj")

    def gated(self, x: np.ndarray, at: str) -> np.ndarray:
        gate = self.linear(x, at + "gate_proj")
        hidden = gate / (1 + np.exp(-gate)) * self.linear(x, at + "up_proj")
        return self.linear(hidden, at + "down_proj")

    def experts(self, x: np.ndarray, at: str) -> np.ndarray:
        logits = x @ self.weights[at + "gate.weight"].T
        bias = self.weights[at + "gate.e_score_correction_bias"]
        active = self.hf["num_experts_per_tok"]
        chosen = routing(logits, bias, active=active, score="sigmoid", normalize=True)
        out = self.gated(x, at + "shared_experts.")
        for token, (ids, shares) in enumerate(zip(*chosen, strict=True)):
            for expert, share in zip(ids, shares, strict=True):
                out[token] += share * self.gated(x[token : token + 1], f"{at}experts.{expert}.")[0]
        return out

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        x = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(self.hf["num_hidden_layers"]):
            at = f"model.layers.{i}."
            x = x + self.attention(self.norm(x, at + "input_layernorm"), at + "self_attn.")
            hidden = self.norm(x, at + "post_attention_layernorm")
            dense = i < self.hf["first_k_dense_replace"]
            x = x + (self.gated if dense else self.experts)(hidden, at + "mlp.")
        return self.norm(x, "model.norm") @ self.weights["lm_head.weight"].T
