"""Token-sparse latent attention: every query has its own list of cached tokens.

What DeepSeek-V3.2 decodes and prefills with, once its indexer (`mla_jax.lightning_indexer`) has
chosen the tokens.
"""

import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.paged import ABSORBED, is_concrete, scale_or_default
from pallas_kernels.token_sparse import token_sparse


def _check_ids(indices: Array, ckv_cache: Array) -> None:
    """ValueError for an index that is neither -1 nor in the pool, where there are values to see."""
    if ckv_cache.ndim != 3:
        raise ValueError(f"ckv_cache: got shape {ckv_cache.shape}, expected [pages, page, latent]")
    slots = ckv_cache.shape[0] * ckv_cache.shape[1]
    if is_concrete(indices) and indices.size:
        values = np.asarray(indices)
        if values.min() < -1 or values.max() >= slots:
            raise ValueError(
                f"indices: got {values.min()} to {values.max()}, expected page * page_size + "
                f"offset, 0 to {slots - 1}, or -1 for none"
            )


def _check_leading(q_nope: Array, q_pe: Array, indices: Array, axes: tuple[str, ...]) -> None:
    """ValueError unless the three have these leading axes, alike."""
    expected = " or ".join(f"[{axis}, heads, width]" for axis in axes)
    if q_nope.ndim - 2 not in {axis.count(",") + 1 for axis in axes}:
        raise ValueError(f"q_nope: got shape {q_nope.shape}, expected {expected}")
    if q_pe.shape[:-1] != q_nope.shape[:-1]:
        raise ValueError(
            f"q_pe: got shape {q_pe.shape}, expected {q_nope.shape[:-1]} and the rope width"
        )
    if indices.shape[:-1] != q_nope.shape[:-2]:
        raise ValueError(
            f"indices: got shape {indices.shape}, expected {q_nope.shape[:-2]} and topk, "
            "a row a query"
        )


def mla_sparse_decode(
    q_nope: Float[Array, "batch *tokens heads latent"],
    q_pe: Float[Array, "batch *tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    indices: Int[Array, "batch *tokens topk"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch *tokens heads latent"], Float[Array, "batch *tokens heads"]]:
    """Absorbed decode attention over the cached tokens that `indices` names, query by query.

    indices int32 [B, topk], or [B, S, topk] for S query tokens: page * page_size + offset of each
    key, in any order; -1 stands for none, anywhere. An index that comes twice counts twice. topk is
    a multiple of 64 up to 2048 (pad with -1). Nothing is causal: whoever makes the indices leaves
    out what a query must not see. Where they are traced, any other index outside the pool counts as
    -1. Slots that no index names may hold anything. Scores (q_nope ckv^T + q_pe kpe^T) * sm_scale
    in float32; the value is the latent. q_nope [B, H, C] or [B, S, H, C]; a rope width of 0 means
    none. sm_scale None is 192^-1/2, for latent 512 and rope 64 only.
    kv_scales: of a cache in float8_e4m3fn, as in `mla_paged_decode`.
    num_splits: parts into which a query's keys are cut; None follows the batch and the device.
    deterministic: a query's result is the same to the bit whatever else is in the batch.
    interpret: with a Pallas backend named, run the kernel's Python on any device.

    Returns out, of q's shape and dtype, and the base-2 log-sum-exp, float32, without q's last axis;
    a query without keys gives 0 and -inf. Everything but shapes may be traced, and vmap makes one
    launch. Gradients: backend="reference" alone.
    Errors: ValueError (shape, or a value where it is concrete), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).
    Source: FlashInfer's sparse `mla_paged` decode, DeepSeek-V3.2 (arXiv:2512.02556).

    >>> import jax.numpy as jnp
    >>> q, pool = jnp.ones((2, 4, 512)), jnp.ones((3, 16, 512))
    >>> indices = jnp.full((2, 64), -1).at[:, :3].set(jnp.array([40, 0, 17]))
    >>> out, lse = mla_sparse_decode(q, jnp.ones((2, 4, 64)), pool, jnp.ones((3, 16, 64)), indices)
    >>> out.shape, lse.shape
    ((2, 4, 512), (2, 4))
    """
    _check_leading(q_nope, q_pe, indices, ("batch", "batch, tokens"))
    _check_ids(indices, ckv_cache)
    sm_scale = scale_or_default(
        sm_scale, {"latent": q_nope.shape[-1], "rope": q_pe.shape[-1]}, ABSORBED
    )
    shape = q_nope.shape
    q_nope, q_pe, indices = (lax.collapse(x, 0, len(shape) - 2) for x in (q_nope, q_pe, indices))
    out, lse = token_sparse(
        *(q_nope, q_pe, ckv_cache, kpe_cache, indices),
        sm_scale=sm_scale,
        kv_scales=kv_scales,
        num_splits=num_splits,
        deterministic=deterministic,
        backend=backend,
        interpret=interpret,
    )
    return out.reshape(shape), lse.reshape(shape[:-1])


def mla_sparse_prefill(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    indices: Int[Array, "tokens topk"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """Absorbed attention of all requests' new tokens over the cached tokens that `indices` names.

    As `mla_sparse_decode`, of whose queries these are T, whatever requests they belong to: each
    row of indices [T, topk] says by itself what its query sees. A padding row is one of -1 alone.

    >>> import jax.numpy as jnp
    >>> q, pool = jnp.ones((5, 4, 512)), jnp.ones((3, 16, 512))
    >>> indices = jnp.where(jnp.arange(64) <= jnp.arange(5)[:, None], jnp.arange(64), -1)
    >>> out, lse = mla_sparse_prefill(
    ...     q, jnp.ones((5, 4, 64)), pool, jnp.ones((3, 16, 64)), indices, sm_scale=0.0
    ... )
    >>> out.shape, (2 ** lse[:, 0]).round().tolist()
    ((5, 4, 512), [1.0, 2.0, 3.0, 4.0, 5.0])
    """
    _check_leading(q_nope, q_pe, indices, ("tokens",))
    return mla_sparse_decode(
        *(q_nope, q_pe, ckv_cache, kpe_cache, indices, sm_scale),
        kv_scales=kv_scales,
        deterministic=deterministic,
        backend=backend,
        interpret=interpret,
    )
