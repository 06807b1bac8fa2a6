"""One MLA layer step by step, as DeepSeek's inference code computes it (seed 003).

Symbols: batch b, new tokens s, heads h, keys t = start_pos + s, latent c (`kv_lora_rank`),
rope r (`qk_rope_head_dim`), a query head d = nope | rope. Weights are [out, in]. Every step
rounds its result to the dtype of `x`; norms, rotation and softmax work in float32 inside.
"""

import dataclasses
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float

from mla_jax.reference.intermediates import round_to, rounded_einsum


# As in `intermediates`: pytree dataclasses also hold tracers and shapes, which are no arrays.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of one MLA layer, [out, in], named as in DeepSeek's checkpoints.

    Queries come from `wq` alone, or from `wq_b(q_norm(wq_a x))`. Rows of `wkv_a` are
    latent | rope; rows of `wkv_b` are, per head, key nope | value.

    >>> ones = jnp.ones
    >>> weights = LayerWeights(
    ...     wq=ones((12, 8)), wkv_a=ones((6, 8)), kv_norm=ones(4), wkv_b=ones((16, 4)),
    ...     wo=ones((8, 8)),
    ... )
    >>> weights.wq_a is None
    True
    """

    wq: Float[Array, "heads*(nope+rope) dim"] | None = None
    wq_a: Float[Array, "q_lora dim"] | None = None
    q_norm: Float[Array, " q_lora"] | None = None
    wq_b: Float[Array, "heads*(nope+rope) q_lora"] | None = None
    wkv_a: Float[Array, "kv_lora+rope dim"]
    kv_norm: Float[Array, " kv_lora"]
    wkv_b: Float[Array, "heads*(nope+v) kv_lora"]
    wo: Float[Array, "dim heads*v"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """Every named value of seed 003's trace; None where a form of the layer has no such value.

    `scores` is the softmax's input: scaled, -inf at keys that a query may not see. `caches` is
    the updated pair that the next call takes.
    """

    q_lora: Float[Array, "batch seq q_lora"] | None  # after q_norm; None with a direct wq
    q: Float[Array, "batch seq heads*(nope+rope)"]
    q_heads: Float[Array, "batch seq heads nope+rope"]
    q_nope: Float[Array, "batch seq heads nope"]
    q_pe: Float[Array, "batch seq heads rope"]
    q_pe_rotated: Float[Array, "batch seq heads rope"]
    kv: Float[Array, "batch seq kv_lora+rope"]
    kv_latent: Float[Array, "batch seq kv_lora"]
    kv_latent_normed: Float[Array, "batch seq kv_lora"]
    k_pe: Float[Array, "batch seq rope"]
    k_pe_rotated: Float[Array, "batch seq 1 rope"]
    k: Float[Array, "batch seq heads nope+rope"] | None  # naive
    v: Float[Array, "batch seq heads v"] | None  # naive
    q_absorbed: Float[Array, "batch seq heads kv_lora"] | None  # absorb
    scores: Float[Array, "batch seq heads keys"]
    probs: Float[Array, "batch seq heads keys"]
    latent_output: Float[Array, "batch seq heads kv_lora"] | None  # absorb
    head_output: Float[Array, "batch seq heads v"]
    out: Float[Array, "batch seq dim"]
    caches: tuple[Float[Array, "batch capacity ..."], Float[Array, "batch capacity ..."]]


def yarn_correction_range(
    *,
    qk_rope_head_dim: int = 64,
    rope_theta: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    original_seq_len: int = 4096,
) -> tuple[float, float]:
    """First and last rotary pair of YaRN's ramp (arXiv:2309.00071).

    Pairs below the first turn more than `beta_fast` times in `original_seq_len` tokens and keep
    their frequency; pairs above the last turn less than `beta_slow` times and are interpolated.

    >>> yarn_correction_range()
    (10.0, 23.0)
    """

    def pair_that_turns(rotations: float) -> float:
        turns = math.log(original_seq_len / (2 * math.pi * rotations))
        return qk_rope_head_dim * turns / (2 * math.log(rope_theta))

    low = float(max(math.floor(pair_that_turns(beta_fast)), 0))
    high = float(min(math.ceil(pair_that_turns(beta_slow)), qk_rope_head_dim - 1))
    return low, high + 0.001 if high == low else high


def precompute_freqs_cis(
    max_seq_len: int,
    *,
    qk_rope_head_dim: int = 64,
    rope_theta: float = 10000.0,
    rope_factor: float = 40.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    original_seq_len: int = 4096,
) -> Complex64[Array, "max_seq_len half"]:
    """exp(i·position·frequency) for positions 0..max_seq_len-1, the table of seed 003.

    DeepSeek's rule: YaRN is on if and only if `max_seq_len` > `original_seq_len`. Evaluated in
    float64 on the host and rounded once. Errors: ValueError for an odd `qk_rope_head_dim`.

    >>> precompute_freqs_cis(4).shape
    (4, 32)
    """
    if qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim: got {qk_rope_head_dim}, expected an even number")
    pairs = np.arange(qk_rope_head_dim // 2)
    freqs = rope_theta ** (-2.0 * pairs / qk_rope_head_dim)
    if max_seq_len > original_seq_len:
        low, high = yarn_correction_range(
            qk_rope_head_dim=qk_rope_head_dim,
            rope_theta=rope_theta,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            original_seq_len=original_seq_len,
        )
        ramp = np.clip((pairs - low) / (high - low), 0.0, 1.0)
        freqs = freqs / rope_factor * ramp + freqs * (1.0 - ramp)
    angles = np.outer(np.arange(max_seq_len), freqs)
    return jnp.asarray(np.exp(1j * angles).astype(np.complex64))


def mla_softmax_scale(
    qk_head_dim: int = 192, *, rope_factor: float = 1.0, mscale: float = 1.0
) -> float:
    """qk_head_dim^-1/2, times YaRN's squared temperature (0.1·mscale·ln rope_factor + 1)².

    `rope_factor` 1, the default, is no YaRN.

    >>> round(mla_softmax_scale(rope_factor=40.0), 6)
    0.135234
    """
    return qk_head_dim**-0.5 * (0.1 * mscale * math.log(rope_factor) + 1.0) ** 2


def ref_layer(
    x: Float[Array, "batch seq dim"],
    weights: LayerWeights,
    *,
    freqs_cis: Complex64[Array, "seq half"],
    n_heads: int,
    kv_lora_rank: int = 512,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    softmax_scale: float | None = None,
    attn_impl: str = "absorb",
    start_pos: int = 0,
    caches: tuple[Array, Array] | None = None,
    norm_eps: float = 1e-6,
) -> LayerTrace:
    """Run one MLA layer on `seq` new tokens at positions start_pos.. and keep every value.

    `freqs_cis` holds the rows of those positions, exp(i·angle); a table whose cos and sin carry a
    factor works as well. Pairs (x[2i], x[2i+1]) are rotated. A query at position i sees keys up to
    and including i, so a prompt may come in chunks. `caches` are contiguous and hold at least
    start_pos + seq tokens: "absorb" keeps the normalised latent [b, capacity, c] and the rotated
    key [b, capacity, r], "naive" full keys [b, capacity, h, nope+rope] and values
    [b, capacity, h, v]. None starts new ones of exactly `seq` tokens. `softmax_scale` None means
    (nope + rope)^-1/2. Integers and `attn_impl` are static under `jit`.

    Errors: ValueError for a shape that does not follow from the constants, missing or surplus
    query weights, a cache too short or absent at start_pos > 0, an unknown `attn_impl`; TypeError
    if matrices or caches are not in the dtype of `x`.

    >>> weights = LayerWeights(
    ...     wq=jnp.ones((12, 8)), wkv_a=jnp.ones((6, 8)), kv_norm=jnp.ones(4),
    ...     wkv_b=jnp.ones((16, 4)), wo=jnp.ones((8, 8)),
    ... )
    >>> trace = ref_layer(
    ...     jnp.ones((1, 3, 8)), weights, freqs_cis=precompute_freqs_cis(3, qk_rope_head_dim=2),
    ...     n_heads=2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
    ... )
    >>> trace.q_absorbed.shape, trace.out.shape
    ((1, 3, 2, 4), (1, 3, 8))
    """
    if attn_impl not in ("naive", "absorb"):
        raise ValueError(f"attn_impl: got {attn_impl!r}, expected 'naive' or 'absorb'")
    batch, seq, dim = x.shape
    end_pos = start_pos + seq
    qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
    query_rows, kv_rows = n_heads * qk_head_dim, n_heads * (qk_nope_head_dim + v_head_dim)
    _check_array("freqs_cis", freqs_cis, (seq, qk_rope_head_dim // 2), jnp.dtype("complex64"))
    _check_array("wkv_a", weights.wkv_a, (kv_lora_rank + qk_rope_head_dim, dim), x.dtype)
    _check_array("kv_norm", weights.kv_norm, (kv_lora_rank,), None)
    _check_array("wkv_b", weights.wkv_b, (kv_rows, kv_lora_rank), x.dtype)
    _check_array("wo", weights.wo, (dim, n_heads * v_head_dim), x.dtype)
    if attn_impl == "absorb":
        token_shapes = ((kv_lora_rank,), (qk_rope_head_dim,))
    else:
        token_shapes = ((n_heads, qk_head_dim), (n_heads, v_head_dim))
    caches = _check_caches(caches, token_shapes, batch, start_pos, end_pos, x.dtype)
    scale = qk_head_dim**-0.5 if softmax_scale is None else softmax_scale

    # 1: queries
    q_lora, q = _project_queries(x, weights, query_rows, norm_eps)
    q_heads = q.reshape(batch, seq, n_heads, qk_head_dim)
    q_nope, q_pe = jnp.split(q_heads, [qk_nope_head_dim], axis=-1)
    q_pe_rotated = rotate_pairs(q_pe, freqs_cis)

    # 2: the latent and the one rotary key that all heads share
    kv = rounded_einsum("bsi,oi->bso", x, weights.wkv_a)
    kv_latent, k_pe = jnp.split(kv, [kv_lora_rank], axis=-1)
    kv_latent_normed = rms_norm(kv_latent, weights.kv_norm, norm_eps)
    k_pe_rotated = rotate_pairs(k_pe[:, :, None], freqs_cis)

    # 3: cache, scores, softmax and weighted sum
    wkv_b = weights.wkv_b.reshape(n_heads, -1, kv_lora_rank)
    wkv_b_key, wkv_b_value = jnp.split(wkv_b, [qk_nope_head_dim], axis=1)
    k = v = q_absorbed = latent_output = None
    if attn_impl == "naive":
        k_nope = rounded_einsum("btc,hdc->bthd", kv_latent_normed, wkv_b_key)
        k_pe_heads = jnp.broadcast_to(k_pe_rotated, (batch, seq, n_heads, qk_rope_head_dim))
        k = jnp.concatenate([k_nope, k_pe_heads], axis=-1)
        v = rounded_einsum("btc,hdc->bthd", kv_latent_normed, wkv_b_value)
        caches = _append(caches, (k, v), start_pos)
        q_full = jnp.concatenate([q_nope, q_pe_rotated], axis=-1)
        raw_scores = rounded_einsum("bshd,bthd->bsht", q_full, caches[0][:, :end_pos])
        scores, probs = _softmax(raw_scores, scale, start_pos)
        head_output = rounded_einsum("bsht,bthd->bshd", probs, caches[1][:, :end_pos])
    else:
        caches = _append(caches, (kv_latent_normed, k_pe_rotated[:, :, 0]), start_pos)
        kv_cache, pe_cache = (cache[:, :end_pos] for cache in caches)
        q_absorbed = rounded_einsum("bshd,hdc->bshc", q_nope, wkv_b_key)
        nope_scores = rounded_einsum("bshc,btc->bsht", q_absorbed, kv_cache)
        pe_scores = rounded_einsum("bshr,btr->bsht", q_pe_rotated, pe_cache)
        both = nope_scores.astype(jnp.float32) + pe_scores.astype(jnp.float32)
        scores, probs = _softmax(round_to(both, x.dtype), scale, start_pos)
        latent_output = rounded_einsum("bsht,btc->bshc", probs, kv_cache)
        head_output = rounded_einsum("bshc,hdc->bshd", latent_output, wkv_b_value)

    # 4: output projection
    out = rounded_einsum("bsi,oi->bso", head_output.reshape(batch, seq, -1), weights.wo)
    return LayerTrace(
        q_lora=q_lora,
        q=q,
        q_heads=q_heads,
        q_nope=q_nope,
        q_pe=q_pe,
        q_pe_rotated=q_pe_rotated,
        kv=kv,
        kv_latent=kv_latent,
        kv_latent_normed=kv_latent_normed,
        k_pe=k_pe,
        k_pe_rotated=k_pe_rotated,
        k=k,
        v=v,
        q_absorbed=q_absorbed,
        scores=scores,
        probs=probs,
        latent_output=latent_output,
        head_output=head_output,
        out=out,
        caches=caches,
    )


def rotate_pairs(
    x: Float[Array, "batch seq heads rope"], freqs_cis: Complex64[Array, "seq half"]
) -> Float[Array, "batch seq heads rope"]:
    """Multiply the complex numbers x[2i] + i·x[2i+1] by `freqs_cis`, in float32.

    >>> rotate_pairs(jnp.ones((1, 1, 1, 2)), jnp.array([[1j]], jnp.complex64)).ravel().tolist()
    [-1.0, 1.0]
    """
    even_odd = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(even_odd[..., 0], even_odd[..., 1]) * freqs_cis[:, None, :]
    return round_to(jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape), x.dtype)


def rms_norm(
    x: Float[Array, "... width"], weight: Float[Array, " width"], eps: float
) -> Float[Array, "... width"]:
    """x / sqrt(mean(x²) + eps) · weight, in float32, rounded once to the dtype of `x`.

    >>> rms_norm(jnp.array([3.0, -3.0]), jnp.ones(2), 0.0).round(3).tolist()
    [1.0, -1.0]
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return round_to(wide * jax.lax.rsqrt(mean_square + eps) * weight.astype(jnp.float32), x.dtype)


def _project_queries(
    x: Array, weights: LayerWeights, query_rows: int, norm_eps: float
) -> tuple[Array | None, Array]:
    wq, wq_a, q_norm, wq_b = weights.wq, weights.wq_a, weights.q_norm, weights.wq_b
    low_rank = (wq_a, q_norm, wq_b)
    if wq is not None and all(weight is None for weight in low_rank):
        _check_array("wq", wq, (query_rows, x.shape[-1]), x.dtype)
        return None, rounded_einsum("bsi,oi->bso", x, wq)
    if wq is not None or wq_a is None or q_norm is None or wq_b is None:
        given = [
            name for name in ("wq", "wq_a", "q_norm", "wq_b") if getattr(weights, name) is not None
        ]
        raise ValueError(f"weights: got {given} for queries, expected wq or wq_a, q_norm and wq_b")
    q_lora_rank = wq_a.shape[0]
    _check_array("wq_a", wq_a, (q_lora_rank, x.shape[-1]), x.dtype)
    _check_array("q_norm", q_norm, (q_lora_rank,), None)
    _check_array("wq_b", wq_b, (query_rows, q_lora_rank), x.dtype)
    q_lora = rms_norm(rounded_einsum("bsi,oi->bso", x, wq_a), q_norm, norm_eps)
    return q_lora, rounded_einsum("bsi,oi->bso", q_lora, wq_b)


def _softmax(raw_scores: Array, scale: float, start_pos: int) -> tuple[Array, Array]:
    """Scale and mask [b, s, h, t] scores, then softmax in float32; both in the scores' dtype."""
    dtype = raw_scores.dtype
    seq, keys = raw_scores.shape[1], raw_scores.shape[3]
    visible = np.tri(seq, keys, start_pos, dtype=bool)[:, None]
    scaled = round_to(raw_scores.astype(jnp.float32) * scale, dtype)
    scores = jnp.where(visible, scaled, -jnp.inf)
    return scores, round_to(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), dtype)


def _append(
    caches: tuple[Array, Array], new: tuple[Array, Array], start_pos: int
) -> tuple[Array, Array]:
    first, second = (
        cache.at[:, start_pos : start_pos + rows.shape[1]].set(rows)
        for cache, rows in zip(caches, new, strict=True)
    )
    return first, second


def _check_caches(
    caches: tuple[Array, Array] | None,
    token_shapes: tuple[tuple[int, ...], tuple[int, ...]],
    batch: int,
    start_pos: int,
    end_pos: int,
    dtype: np.dtype,
) -> tuple[Array, Array]:
    if start_pos < 0:
        raise ValueError(f"start_pos: got {start_pos}, expected 0 or more")
    if caches is None:
        if start_pos > 0:
            raise ValueError(
                f"caches: got None, expected the {start_pos} tokens before {start_pos=}"
            )
        first, second = (jnp.zeros((batch, end_pos, *shape), dtype) for shape in token_shapes)
        return first, second
    capacity = caches[0].shape[1]
    if capacity < end_pos:
        raise ValueError(f"caches: got room for {capacity} tokens, expected at least {end_pos}")
    for index, (cache, shape) in enumerate(zip(caches, token_shapes, strict=True)):
        _check_array(f"caches[{index}]", cache, (batch, capacity, *shape), dtype)
    return caches


def _check_array(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype | None) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: got {array.dtype}, expected {dtype}")
