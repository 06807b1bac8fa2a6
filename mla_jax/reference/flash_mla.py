"""FlashMLA's functions in plain jnp, a step a line, dense, in float32 (seed 001).

Every key is gathered and every score made, so memory is heads times queries times keys. Inputs are
those of `mla_jax.flash_mla`, not checked; results are float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64


def _float32(array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return array.astype(jnp.float32)


def _logical(
    cache: Float[Array, "batch kv_heads blocks block width"], table: Int[Array, "batch blocks"]
) -> Float[Array, "batch kv_heads tokens width"]:
    """Keys or values of each request in the order of its tokens."""
    in_range = jnp.clip(table, 0, cache.shape[2] - 1)
    ordered = jax.vmap(lambda blocks, ids: blocks[:, ids])(cache, in_range)
    return _float32(ordered.reshape(*ordered.shape[:2], -1, ordered.shape[-1]))


def _attend(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads keys width"],
    v: Float[Array, "batch kv_heads keys value_width"],
    scale: float,
    visible: Bool[Array, "#batch #heads #tokens keys"],
    bias: Float[Array, "#batch #heads #tokens keys"] | None = None,
) -> tuple[Float[Array, "batch heads tokens value_width"], Float[Array, "batch heads tokens"]]:
    """(out, natural-log lse); 0 and -inf for a query that sees nothing."""
    ratio = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, ratio, axis=1), jnp.repeat(v, ratio, axis=1)
    used = visible.any(axis=(1, 2), keepdims=True).swapaxes(2, 3)
    # Slots that nobody sees may hold NaN, and 0 * NaN is NaN.
    k, v = jnp.where(used, k, 0.0), jnp.where(used, v, 0.0)
    scores = jnp.einsum("bhqd,bhkd->bhqk", _float32(q), k, precision="highest") * scale
    scores = scores if bias is None else scores + bias
    scores = jnp.where(visible, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision="highest"), lse


def _split(
    mask: Bool[Array, "*leading given"] | Float[Array, "*leading given"], keys: int
) -> tuple[Bool[Array, "*leading keys"], Float[Array, "*leading keys"] | None]:
    """A mask as (visible, bias) over the first `keys` keys; keys behind its end are hidden."""
    short = [(0, 0)] * (mask.ndim - 1) + [(0, max(keys - mask.shape[-1], 0))]
    if mask.dtype == jnp.bool_:
        return jnp.pad(mask, short)[..., :keys], None
    bias = jnp.pad(_float32(mask), short, constant_values=-jnp.inf)[..., :keys]
    return jnp.ones_like(bias, jnp.bool_), bias


def ref_flash_mla_with_kvcache(
    q: Float[Array, "batch heads 1 width"],
    k_cache: Float[Array, "batch kv_heads blocks 64 width"],
    v_cache: Float[Array, "batch kv_heads blocks 64 width"],
    block_table: Int[Array, "batch blocks"],
    seq_lens: Int[Array, " batch"],
    mask: Bool[Array, "batch mask_heads 1 keys"]
    | Float[Array, "batch mask_heads 1 keys"]
    | None = None,
    *,
    softmax_scale: float | None = None,
) -> Float[Array, "batch heads 1 width"]:
    """The oracle of `flash_mla_with_kvcache` with both caches.

    >>> cache, table = jnp.ones((1, 2, 3, 64, 16)), jnp.array([[2, 0, 1]])
    >>> q, lengths = jnp.ones((1, 4, 1, 16)), jnp.array([70])
    >>> ref_flash_mla_with_kvcache(q, cache, cache, table, lengths).shape
    (1, 4, 1, 16)
    """
    k, v = _logical(k_cache, block_table), _logical(v_cache, block_table)
    keys = k.shape[2]
    visible, bias = (jnp.arange(keys) < seq_lens[:, None])[:, None, None], None
    if mask is not None:
        kept, bias = _split(mask, keys)
        visible = visible & kept
    return _attend(q, k, v, softmax_scale or q.shape[-1] ** -0.5, visible, bias)[0]


def ref_flash_mla_pool(
    q: Float[Array, "batch tokens heads width"],
    pool: Float[Array, "num_blocks 64 kv_heads width"],
    block_table: Int[Array, "batch blocks"],
    seq_lens: Int[Array, " batch"],
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    attn_sink: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch heads tokens"]]:
    """The oracle of `flash_mla_with_kvcache` without v_cache: (out, natural-log lse).

    >>> pool, q = jnp.ones((3, 64, 1, 576)), jnp.ones((1, 2, 4, 576))
    >>> out, lse = ref_flash_mla_pool(q, pool, jnp.array([[2, 0]]), jnp.array([70]))
    >>> out.shape, lse.shape
    ((1, 2, 4, 512), (1, 4, 2))
    """
    batch, tokens, _, width = q.shape
    blocks = pool[jnp.clip(block_table, 0, pool.shape[0] - 1)]  # [B, blocks, 64, Hk, D]
    k = _float32(blocks.reshape(batch, -1, *pool.shape[2:]).swapaxes(1, 2))
    last = seq_lens[:, None] - (tokens - 1 - jnp.arange(tokens) if causal else 0) - 1
    last = jnp.broadcast_to(last, (batch, tokens))
    visible = jnp.arange(k.shape[2]) <= last[..., None]
    out, lse = _attend(
        *(q.swapaxes(1, 2), k, k[..., :head_dim_v]),
        softmax_scale or width**-0.5,
        visible[:, None],
    )
    if attn_sink is not None:
        sink = _float32(attn_sink)[:, None]
        with_sink = jnp.logaddexp(lse, sink)
        share = jnp.where(jnp.isneginf(with_sink), 0.0, jnp.exp(lse - with_sink))
        out = out * jnp.where(jnp.isposinf(sink), 0.0, share)[..., None]
    return out.swapaxes(1, 2), lse


def ref_flash_mla_prefill(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads tokens width"],
    v: Float[Array, "batch kv_heads tokens width"],
    sparse_layout: Bool[Array, "*leading blocks blocks"] | None = None,
    attn_mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None = None,
    *,
    softmax_scale: float | None = None,
) -> Float[Array, "batch heads tokens width"]:
    """The oracle of `flash_mla_prefill`.

    >>> q, k = jnp.ones((1, 4, 130, 16)), jnp.ones((1, 2, 130, 16))
    >>> ref_flash_mla_prefill(q, k, k).shape
    (1, 4, 130, 16)
    """
    tokens = q.shape[2]
    bias = None
    if attn_mask is None:
        visible = jnp.tri(tokens, dtype=jnp.bool_)[None, None]
    else:
        visible, bias = _split(attn_mask[:, :, :tokens], tokens)
    if sparse_layout is not None:
        layout = sparse_layout
        layout = layout[:, None] if layout.ndim == 3 else layout
        layout = layout[None, None] if layout.ndim == 2 else layout
        for axis in (2, 3):
            layout = jnp.repeat(layout, BLOCK, axis=axis)
        visible = visible & layout[:, :, :tokens, :tokens]
    k, v = _float32(k), _float32(v)
    return _attend(q, k, v, softmax_scale or q.shape[-1] ** -0.5, visible, bias)[0]


def ref_mha_fwd_kvcache(
    q: Float[Array, "batch heads tokens width"],
    k_cache: Float[Array, "batch kv_heads blocks 64 width"],
    v_cache: Float[Array, "batch kv_heads blocks 64 width"],
    block_table: Int[Array, "batch blocks"],
    attn_mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None = None,
    *,
    softmax_scale: float | None = None,
) -> Float[Array, "batch heads tokens width"]:
    """The oracle of `mha_fwd_kvcache` over caches that hold the prompts.

    >>> q, cache, table = jnp.ones((1, 2, 70, 16)), jnp.ones((1, 2, 2, 64, 16)), jnp.array([[1, 0]])
    >>> ref_mha_fwd_kvcache(q, cache, cache, table).shape
    (1, 2, 70, 16)
    """
    tokens = q.shape[2]
    k, v = (_logical(cache, block_table)[:, :, :tokens] for cache in (k_cache, v_cache))
    return ref_flash_mla_prefill(q, k, v, None, attn_mask, softmax_scale=softmax_scale)
