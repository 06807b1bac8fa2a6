"""Latent attention over pages listed in CSR form, as FlashInfer's `mla_paged` lists them."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_decode import paged_decode

DEFAULT_LATENT, DEFAULT_ROPE = 512, 64
DEFAULT_SM_SCALE = 192**-0.5
"""DeepSeek's (128 + 64)^-1/2: the width of a head before absorption, not of the latent."""


def _check_concrete(
    kv_indptr: Array, kv_indices: Array, last: Array | None, num_pages: int, page_size: int
) -> None:
    """Value errors, where there are values to see: under jit the arrays are traced."""
    if any(isinstance(array, Tracer) for array in (kv_indptr, kv_indices, last)):
        return
    indptr = np.asarray(kv_indptr)
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"kv_indptr: got {indptr.tolist()}, expected 0 and then no decrease")
    if indptr[-1] > kv_indices.shape[0]:
        raise ValueError(
            f"kv_indices: got {kv_indices.shape[0]} ids, expected kv_indptr's {indptr[-1]}"
        )
    used = np.asarray(kv_indices)[: indptr[-1]]
    if used.size and not (used.min() >= 0 and used.max() < num_pages):
        raise ValueError(
            f"kv_indices: got ids from {used.min()} to {used.max()}, expected 0 to {num_pages - 1}"
        )
    if last is not None:
        lengths = np.asarray(last)[np.diff(indptr) > 0]
        if lengths.size and not (lengths.min() >= 1 and lengths.max() <= page_size):
            raise ValueError(
                f"kv_last_page_len: got {lengths.min()} to {lengths.max()}, "
                f"expected 1 to {page_size}"
            )


def mla_paged_decode(
    q_nope: Float[Array, "batch *tokens heads latent"],
    q_pe: Float[Array, "batch *tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    kv_indptr: Int[Array, " batch_plus_1"],
    kv_indices: Int[Array, " ids"],
    sm_scale: float | Float[Array, ""] | None = None,
    *,
    kv_last_page_len: Int[Array, " batch"] | None = None,
    num_splits: int | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch *tokens heads latent"], Float[Array, "batch *tokens heads"]]:
    """Absorbed decode attention over a paged latent cache (FlashInfer's `mla_paged` decode).

    Request b reads the pages kv_indices[kv_indptr[b]:kv_indptr[b+1]] (int32 page ids, any order,
    shared at will), all full but the last, which holds kv_last_page_len[b] tokens (None: full
    too). Scores (q_nope ckv^T + q_pe kpe^T) * sm_scale in float32; the value is the latent.
    q_nope [B, H, C], or [B, S, H, C] for S of 1 to 8 query tokens that are the last positions,
    causal among themselves. kv_indices may be longer than kv_indptr[-1]; the tail is not read.
    sm_scale None is 192^-1/2, for latent 512 and rope 64 only.
    Returns out, of q's shape and dtype, and the base-2 log-sum-exp, float32, without q's last
    axis; a request without keys gives 0 and -inf. Everything but shapes may be traced.
    Errors: ValueError (shape, or a value where it is concrete), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).

    >>> q, page = jnp.ones((1, 2, 512)), jnp.ones((3, 16, 512))
    >>> indptr, pages = jnp.array([0, 2]), jnp.array([2, 0])
    >>> out, lse = mla_paged_decode(
    ...     q, jnp.ones((1, 2, 64)), page, jnp.ones((3, 16, 64)), indptr, pages
    ... )
    >>> out.shape, lse.shape
    ((1, 2, 512), (1, 2))
    """
    if q_nope.ndim not in (3, 4) or q_pe.ndim != q_nope.ndim:
        raise ValueError(
            f"q_nope, q_pe: got shapes {q_nope.shape} and {q_pe.shape}, "
            "expected both [batch, heads, width] or both [batch, tokens, heads, width]"
        )
    batch, latent, rope = q_nope.shape[0], q_nope.shape[-1], q_pe.shape[-1]
    if sm_scale is None and (latent, rope) != (DEFAULT_LATENT, DEFAULT_ROPE):
        raise ValueError(
            f"sm_scale: got None for latent {latent} and rope {rope}, expected a value: "
            f"the default holds for {DEFAULT_LATENT} and {DEFAULT_ROPE}"
        )
    if kv_indptr.shape != (batch + 1,):
        raise ValueError(
            f"kv_indptr: got shape {kv_indptr.shape}, expected ({batch + 1},), one more than q_nope"
        )
    if kv_last_page_len is not None and kv_last_page_len.shape != (batch,):
        raise ValueError(
            f"kv_last_page_len: got shape {kv_last_page_len.shape}, expected ({batch},)"
        )
    num_pages, page_size = ckv_cache.shape[:2]
    _check_concrete(kv_indptr, kv_indices, kv_last_page_len, num_pages, page_size)

    pages = jnp.diff(kv_indptr)
    length = pages * page_size
    if kv_last_page_len is not None:
        length = jnp.where(pages > 0, length - page_size + kv_last_page_len, 0)
    single = q_nope.ndim == 3
    out, lse = paged_decode(
        q_nope[:, None] if single else q_nope,
        q_pe[:, None] if single else q_pe,
        ckv_cache,
        kpe_cache,
        kv_indices,
        kv_indptr[:-1],
        length,
        sm_scale=DEFAULT_SM_SCALE if sm_scale is None else sm_scale,
        num_splits=num_splits,
        backend=backend,
        interpret=interpret,
    )
    return (out[:, 0], lse[:, 0]) if single else (out, lse)
