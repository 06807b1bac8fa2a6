"""FlashMLA's calls: decode over a paged cache, prefill with sparse layouts, grouped query heads.

Blk is 64 tokens a block. Query head h reads key head h // (Hq / Hk). Softmax and sums are in
float32. Arrays are JAX's, NumPy's or torch's; results are JAX's, in q's dtype (bfloat16 for
float8_e4m3fn). Shapes and dtypes are always checked, values (lengths, block ids) where they are
concrete: such a check waits for the device, so jit what runs in a loop. Everything but shapes may
be traced.

Source: FlashMLA's interface (deepseek-ai/FlashMLA).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla_jax import _flash_mla_checks as check
from mla_jax.quantization import QuantizedLatents
from pallas_kernels.grouped_attention.blocks import BLOCK, compute_dtype
from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.api import MAX_QUERY_TOKENS
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.sparse_prefill import sparse_prefill

__all__ = [
    "MLAMetadata",
    "flash_mla_prefill",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "mha_fwd_kvcache",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAMetadata:
    """The shapes that `get_mla_metadata` has checked: hashable, for jit's static arguments."""

    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]


def get_mla_metadata(
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    block_table: Int[Array, "batch blocks"],
    seq_lens: Int[Array, " batch"],
) -> MLAMetadata:
    """A record that these shapes fit together, and, where values are concrete, these values.

    q_shape [B, Hq, 1, D] with kv_shape [B, Hk, Nblk, 64, D] and block_table [B, Nblk]; or
    q_shape [B, s_q, Hq, D] with a pool's kv_shape [num_blocks, 64, Hk, D] and block_table [B, any].
    Nothing is allocated. Split plans are made on the device inside a call, from the lengths.
    Errors: ValueError (shape, value), TypeError (block_table, seq_lens not of integers).

    >>> metadata = get_mla_metadata(
    ...     (1, 8, 1, 64), (1, 2, 4, 64, 64), jnp.array([[3, 1, 0, 2]]), jnp.array([200])
    ... )
    >>> metadata.q_shape, metadata.kv_shape
    ((1, 8, 1, 64), (1, 2, 4, 64, 64))
    """
    metadata = MLAMetadata(q_shape=tuple(q_shape), kv_shape=tuple(kv_shape))
    block_table, seq_lens = check.with_shape(block_table), check.with_shape(seq_lens)
    check.check_shapes(metadata.q_shape, metadata.kv_shape, tuple(block_table.shape))
    check.check_requests(metadata.q_shape, metadata.kv_shape, block_table, seq_lens)
    return metadata


def flash_mla_with_kvcache(
    q: Float[Array, "batch heads 1 width"],
    k_cache: Float[Array, "batch kv_heads blocks block width"],
    v_cache: Float[Array, "batch kv_heads blocks block width"] | None = None,
    block_table: Int[Array, "batch blocks"] | None = None,
    seq_lens: Int[Array, " batch"] | None = None,
    mask: Bool[Array, "batch mask_heads 1 keys"]
    | Float[Array, "batch mask_heads 1 keys"]
    | None = None,
    metadata: MLAMetadata | None = None,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | Float[Array, ""] | None = None,
    causal: bool = False,
    attn_sink: Float[Array, " heads"] | None = None,
    descale_q: float | Float[Array, "*one"] | None = None,
    descale_k: float | Float[Array, "*one"] | None = None,
    is_fp8_kvcache: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> Any:
    """Decode attention over a paged cache, in either of two forms.

    With v_cache: q [B, Hq, 1, D] is one token a request; token t of (b, key head h) lies at
    k_cache[b, h, block_table[b, t // 64], t % 64], caches [B, Hk, Nblk, 64, D]; t < seq_lens[b] is
    seen, less what `mask` [B, 1 or Hq, 1, keys] hides (True keeps, a float is added to the scaled
    scores). Returns out [B, Hq, 1, D].

    Without, as in FlashMLA's own call: q [B, s_q, Hq, D], D = 576, over a pool
    k_cache [num_blocks, 64, Hk, D] that all requests share; the first `head_dim_v` columns of a key
    are its value. The s_q tokens are the last of the seq_lens[b] in the cache; with `causal` each
    sees those up to its own position, without all of them. attn_sink [Hq] is the score of one more
    key without a value: out is multiplied by e^lse / (e^lse + e^sink). Returns
    out [B, s_q, Hq, head_dim_v] and the natural log-sum-exp [B, Hq, s_q] float32, without the sink.
    In float8_e4m3fn q and the pool are multiplied with descale_q and descale_k, a number each (None
    is 1), and out is bfloat16. is_fp8_kvcache: the pool's rows are bytes, 656 for DeepSeek-V3.2, as
    `QuantizedLatents.packed` makes them, beside a q of another dtype.
    The kernels read latent and rotated columns from arrays of their own, so this form copies the
    pool: where speed counts, keep them apart and call `mla_paged_decode`.

    Only entries of block_table up to the length mean anything; the rest, and slots behind the
    length, may hold anything. softmax_scale None is D^-1/2. metadata: of `get_mla_metadata`, None
    makes it. backend, interpret: as in `mla_paged_decode`.
    A query that sees no key gives 0, and -inf as its lse, where FlashMLA's lse is +inf.
    Errors: ValueError (shape, stride, value), TypeError (dtype), NotImplementedError (backend).

    >>> cache, table = jnp.ones((1, 2, 3, 64, 16)), jnp.array([[2, 0, 1]])
    >>> q, lengths = jnp.ones((1, 4, 1, 16)), jnp.array([70])
    >>> flash_mla_with_kvcache(q, cache, cache, table, lengths).shape
    (1, 4, 1, 16)
    >>> pool, q = jnp.ones((3, 64, 1, 576)), jnp.ones((1, 2, 4, 576))
    >>> out, lse = flash_mla_with_kvcache(
    ...     q, pool, block_table=table, seq_lens=lengths, causal=True
    ... )
    >>> out.shape, lse.shape
    ((1, 2, 4, 512), (1, 4, 2))
    """
    if block_table is None or seq_lens is None:
        name = "block_table" if block_table is None else "seq_lens"
        raise ValueError(f"{name}: got None, expected integers")
    table, lengths = check.with_shape(block_table), check.with_shape(seq_lens)
    if (v_cache is None) != (len(k_cache.shape) == 4):
        got = "None" if v_cache is None else f"shape {tuple(v_cache.shape)}"
        raise ValueError(
            f"v_cache: got {got} beside k_cache's shape {tuple(k_cache.shape)}, expected None for "
            "a pool of 4 dims, or an array like k_cache's 5"
        )
    scales = check.descales(q, v_cache, is_fp8_kvcache, descale_q, descale_k)
    packed = None
    if is_fp8_kvcache:
        packed = check.packed_rows(q, k_cache, head_dim_v)
        # To the checks it is the cache that it stands for.
        stood_for: Any = jax.ShapeDtypeStruct((*k_cache.shape[:3], q.shape[-1]), q.dtype)
        k_cache = stood_for
    own = MLAMetadata(q_shape=tuple(q.shape), kv_shape=tuple(k_cache.shape))
    check.check_shapes(own.q_shape, own.kv_shape, tuple(table.shape))
    if metadata is not None and metadata != own:
        raise ValueError(f"metadata: got {metadata}, expected that of these arrays, {own}")
    caches = {"k_cache": k_cache} | ({} if v_cache is None else {"v_cache": v_cache})
    check.check_caches(q, caches, table)
    check.check_requests(own.q_shape, own.kv_shape, table, lengths)
    scale = _scale(softmax_scale, own.q_shape[-1])
    options = {"sm_scale": scale, "backend": backend, "interpret": interpret}
    if v_cache is None:
        if mask is not None:
            raise ValueError("mask: got an array, expected None where v_cache is None")
        sink = None if attn_sink is None else check.to_jax(attn_sink)
        q, table, lengths = map(check.to_jax, (q, table, lengths))
        if not 0 < head_dim_v <= q.shape[-1]:
            raise ValueError(
                f"head_dim_v: got {head_dim_v}, expected 1 to {q.shape[-1]}, q's last dim"
            )
        if packed is None:
            pools, kv_scales = _split(check.to_jax(k_cache), head_dim_v), scales.k
        else:
            latents = QuantizedLatents.unpack(packed, latent=head_dim_v)
            pools, kv_scales = (latents.ckv, latents.kpe.astype(q.dtype)), latents.scales
        options |= {"sm_scale": scale * scales.q, "kv_scales": kv_scales}
        return _decode_pool(q, pools, table, lengths, causal, sink, **options)
    if attn_sink is not None:
        raise ValueError("attn_sink: got an array, expected None where v_cache is given")
    if mask is not None:
        check.check_decode_mask(mask, own.q_shape, lengths)
        mask = check.to_jax(mask)[:, :, 0]
    q, k, v, table, lengths = map(check.to_jax, (q, k_cache, v_cache, table, lengths))
    out, _ = grouped_decode(q[:, :, 0], k, v, table, lengths, mask, **options)
    return out[:, :, None]


def flash_mla_prefill(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads tokens width"],
    v: Float[Array, "batch kv_heads tokens width"],
    sparse_layout: Bool[Array, "*leading blocks blocks"] | None = None,
    attn_mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None = None,
    *,
    softmax_scale: float | Float[Array, ""] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch heads tokens width"]:
    """Attention of prompts of P tokens: causal, or as `attn_mask` says; a layout skips blocks.

    q [B, Hq, P, D], k and v [B, Hk, P, D]. attn_mask [B, 1 or Hq, P, P] takes the causal mask's
    place: True keeps, a float is added to the scaled scores. sparse_layout, bool [nb, nb],
    [B, nb, nb] or [B, 1 or Hq, nb, nb] with nb = ceil(P / 64), says which blocks of 64 queries by
    64 keys are looked at besides; a block that it, or causality, leaves out costs no work. A query
    that sees no key gives 0. softmax_scale None is D^-1/2.
    Returns out [B, Hq, P, D]. Errors: ValueError (shape, stride), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).

    >>> q, k = jnp.ones((1, 4, 130, 16)), jnp.ones((1, 2, 130, 16))
    >>> flash_mla_prefill(q, k, k, sparse_layout=jnp.eye(3, dtype=bool)).shape
    (1, 4, 130, 16)
    """
    shape, k_shape = tuple(q.shape), tuple(k.shape)
    check.check_rank("q", shape, "[batch, heads, tokens, width]")
    check.check_rank("k", k_shape, "[batch, kv_heads, tokens, width]")
    want = (shape[0], k_shape[1], *shape[2:])
    for name, array in (("k", k), ("v", v)):
        check.check_like(name, tuple(array.shape), want, "q", shape)
    check.check_heads(shape, shape[1], "k", k_shape, k_shape[1])
    for name, array in (("q", q), ("k", k), ("v", v)):
        check.check_strides(name, array, 1)
    check.check_dtypes({"q": q, "k": k, "v": v})
    if attn_mask is not None:
        check.check_prefill_mask(attn_mask, shape)
        attn_mask = check.to_jax(attn_mask)
    out, _ = sparse_prefill(
        *map(check.to_jax, (q, k, v)),
        layout=None if sparse_layout is None else check.to_jax(sparse_layout),
        mask=attn_mask,
        causal=attn_mask is None,
        sm_scale=_scale(softmax_scale, shape[-1]),
        backend=backend,
        interpret=interpret,
    )
    return out


def mha_fwd_kvcache(
    q: Float[Array, "batch heads tokens width"],
    k_cache: Float[Array, "batch kv_heads blocks block width"],
    v_cache: Float[Array, "batch kv_heads blocks block width"],
    block_table: Int[Array, "batch blocks"],
    attn_mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None = None,
    *,
    k_new: Float[Array, "batch kv_heads tokens width"] | None = None,
    v_new: Float[Array, "batch kv_heads tokens width"] | None = None,
    softmax_scale: float | Float[Array, ""] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> Any:
    """Attention of prompts of P tokens over a paged cache, into which their keys may go first.

    q [B, H, P, D]; caches [B, Hk, Nblk, 64, D] with H a multiple of Hk and Nblk >= ceil(P / 64);
    token t lies in block block_table[b, t // 64], slot t % 64, whose ids are distinct where they
    are written to. Causal, or as attn_mask [B, 1 or H, P, P] says (True keeps, a float is added).
    Slots behind P and entries of block_table behind the last used one may hold anything.
    Returns out [B, H, P, D]; with k_new and v_new [B, Hk, P, D], which are written first,
    (out, k_cache, v_cache): new arrays, or the old ones' memory where a jit donates these.
    softmax_scale None is D^-1/2. Errors: as in `flash_mla_with_kvcache`.

    >>> q, table = jnp.ones((1, 2, 70, 16)), jnp.array([[1, 0]])
    >>> cache = jnp.zeros((1, 2, 2, 64, 16))
    >>> mha_fwd_kvcache(q, cache, cache, table).shape
    (1, 2, 70, 16)
    >>> out, k_cache, v_cache = mha_fwd_kvcache(q, cache, cache, table, k_new=q, v_new=q)
    >>> int(k_cache[0, 0, 1].sum()), int(k_cache[0, 0, 0].sum())
    (1024, 96)
    """
    block_table = check.with_shape(block_table)
    shape, kv_shape = tuple(q.shape), tuple(k_cache.shape)
    check.check_rank("q", shape, "[batch, heads, tokens, width]")
    check.check_cache_shape(shape, kv_shape, tuple(block_table.shape))
    batch, _, tokens, width = shape
    if kv_shape[2] * BLOCK < tokens:
        raise ValueError(
            f"block_table: got {kv_shape[2]} blocks in shape {tuple(block_table.shape)}, expected "
            f"{-(-tokens // BLOCK)} or more for the {tokens} tokens of q's shape {shape}. "
            f"{check.FIX_BLOCKS}"
        )
    check.check_caches(q, {"k_cache": k_cache, "v_cache": v_cache}, block_table)
    writes = k_new is not None or v_new is not None
    for name, array in (("k_new", k_new), ("v_new", v_new)) if writes else ():
        if array is None:
            raise ValueError(f"{name}: got None, expected an array like the other new one")
        want = (batch, kv_shape[1], tokens, width)
        check.check_like(name, tuple(array.shape), want, "q", shape)
        check.check_strides(name, array, 1)
        check.check_dtypes({"q": q, name: array})
    lengths = jnp.full(batch, tokens, jnp.int32)
    q, k_cache, v_cache, table = map(check.to_jax, (q, k_cache, v_cache, block_table))
    check.check_block_ids(table, lengths, kv_shape[2], unique=writes)
    if attn_mask is not None:
        check.check_prefill_mask(attn_mask, shape)
        attn_mask = check.to_jax(attn_mask)
    if writes:
        k_cache = _write_tokens(k_cache, table, check.to_jax(k_new))
        v_cache = _write_tokens(v_cache, table, check.to_jax(v_new))
    out, _ = sparse_prefill(
        *(q, k_cache, v_cache),
        block_table=table,
        mask=attn_mask,
        causal=attn_mask is None,
        sm_scale=_scale(softmax_scale, width),
        backend=backend,
        interpret=interpret,
    )
    return (out, k_cache, v_cache) if writes else out


def _decode_pool(
    q: Array,
    pools: tuple[Array, Array],
    table: Array,
    lengths: Array,
    causal: bool,
    sink: Array | None,
    *,
    kv_scales: Array | None,
    **options: Any,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch heads tokens"]]:
    """The call without v_cache: latent attention, once for each key head."""
    batch, tokens, heads, width = q.shape
    kv_heads, head_dim_v = pools[0].shape[2:]
    if sink is not None and (
        sink.shape != (heads,) or not jnp.issubdtype(sink.dtype, jnp.floating)
    ):
        raise ValueError(f"attn_sink: got {sink.dtype} {sink.shape}, expected floats {(heads,)}")
    q = q.astype(compute_dtype(q.dtype))
    requests = table.reshape(-1), jnp.arange(batch, dtype=jnp.int32) * table.shape[1], lengths

    def attend(
        q: Array, pools: tuple[Array, Array], kv_scales: Array | None
    ) -> tuple[Array, Array]:
        rows, scaled = q.shape[:3], {"kv_scales": kv_scales, **options}
        if causal and tokens > MAX_QUERY_TOKENS:
            start = jnp.arange(batch, dtype=jnp.int32) * tokens
            out, lse = paged_prefill(
                *_split(lax.collapse(q, 0, 2), head_dim_v),
                *(*pools, *requests, start, jnp.full_like(start, tokens)),
                max_count=tokens,
                **scaled,
            )
        else:
            # Tokens that see the same keys are to the kernel as more heads of one token.
            alike = rows if causal else (batch, 1, tokens * rows[2])
            out, lse = paged_decode(
                *_split(q.reshape(*alike, width), head_dim_v),
                *(*pools, *requests),
                **scaled,
            )
        return out.reshape(*rows, head_dim_v), lse.reshape(rows)

    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    by_head = None if kv_scales is None or kv_scales.ndim == 0 else 2
    out, lse = jax.vmap(attend, (2, 2, by_head), out_axes=2)(grouped, pools, kv_scales)
    out, lse = out.reshape(batch, tokens, heads, head_dim_v), lse.reshape(batch, tokens, heads)
    lse = lse * math.log(2)
    if sink is not None:
        sink = sink.astype(jnp.float32)
        share = jnp.where(jnp.isneginf(sink), 1.0, jax.nn.sigmoid(lse - sink))
        out = (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)
    return out, jnp.swapaxes(lse, 1, 2)


def _split(array: Array, width: int) -> tuple[Array, Array]:
    """The first `width` columns, and the others."""
    return array[..., :width], array[..., width:]


def _write_tokens(
    cache: Float[Array, "batch kv_heads blocks block width"],
    table: Int[Array, "batch blocks"],
    new: Float[Array, "batch kv_heads tokens width"],
) -> Float[Array, "batch kv_heads blocks block width"]:
    """The cache with token t in block table[b, t // 64]; an id out of range writes nothing."""
    token = jnp.arange(new.shape[2])
    block = table[:, token // BLOCK]
    block = jnp.where(block < 0, cache.shape[2], block)  # a negative index would count from the end
    request = jnp.arange(cache.shape[0])[:, None]
    where = cache.at[request, :, block, token % BLOCK]
    return where.set(jnp.swapaxes(new, 1, 2), mode="drop")


def _scale(softmax_scale: float | Array | None, width: int) -> float | Array:
    return width**-0.5 if softmax_scale is None else softmax_scale
