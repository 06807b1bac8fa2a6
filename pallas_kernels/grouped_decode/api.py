"""The one entry of grouped decode: a block table and a length a request, keys and values."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.grouped_attention.blocks import BLOCK, DTYPES
from pallas_kernels.grouped_attention.checks import check_mask
from pallas_kernels.grouped_decode import triton
from pallas_kernels.grouped_decode.reference import grouped_decode_reference
from pallas_kernels.grouped_decode.tiles import problem_of, unsupported

# Fastest first.
BACKENDS = (
    Backend(
        name="triton",
        run=triton.grouped_decode_triton,
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, num_splits, deterministic, interpret: grouped_decode_reference(*args),
    ),
)


def _check(q: Array, caches: dict[str, Array], table: Array, length: Array) -> None:
    """ValueError for shapes, TypeError for dtypes."""
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"q: got shape {q.shape}, expected [batch, heads, width], none empty")
    batch, heads, width = q.shape
    for name, cache in caches.items():
        want = (batch, *caches["k_cache"].shape[1:3], BLOCK, width)
        if cache.ndim != 5 or cache.shape != want or 0 in want or heads % want[1]:
            raise ValueError(
                f"{name}: got shape {cache.shape}, expected [{batch}, kv_heads, blocks, {BLOCK}, "
                f"{width}], alike for both caches, kv_heads a divisor of {heads}"
            )
        if cache.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {cache.dtype}, expected {q.dtype}, q's")
    if str(q.dtype) not in DTYPES:
        raise TypeError(f"q: got dtype {q.dtype}, expected one of {', '.join(DTYPES)}")
    shapes = {"block_table": (batch, caches["k_cache"].shape[2]), "length": (batch,)}
    for name, array in (("block_table", table), ("length", length)):
        if array.shape != shapes[name]:
            raise ValueError(f"{name}: got shape {array.shape}, expected {shapes[name]}")
        if array.dtype != jnp.int32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")


def grouped_decode(
    q: Float[Array, "batch heads width"],
    k_cache: Float[Array, "batch kv_heads blocks block width"],
    v_cache: Float[Array, "batch kv_heads blocks block width"],
    block_table: Int[Array, "batch blocks"],
    length: Int[Array, " batch"],
    mask: Bool[Array, "batch mask_heads keys"]
    | Float[Array, "batch mask_heads keys"]
    | None = None,
    *,
    sm_scale: float | Float[Array, ""],
    num_splits: int | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch heads width"], Float[Array, "batch heads"]]:
    """Attention of one new token a request over paged keys and values, heads in groups.

    Query head h reads key head h // (heads / kv_heads). Token t of request b lies in slot t % 64 of
    the block block_table[b, t // 64] of the request's own blocks; the first length[b] tokens are
    seen, less those that `mask` hides: [batch, 1 or heads, keys], True keeps, a float is added to
    the scaled scores. Table entries behind the last used one and slots behind the length are never
    used, whatever they hold; ids out of range are clamped; keys behind a mask's end are not seen.
    Scores are q k^T * sm_scale in float32. Everything but shapes may be traced.

    num_splits, deterministic, interpret: as in `paged_decode`.
    Returns out [batch, heads, width] of q's dtype (bfloat16 for float8_e4m3fn) and the base-2
    log-sum-exp [batch, heads] float32; a request that sees no key gives 0 and -inf.
    Errors: ValueError (shape), TypeError (dtype), NotImplementedError (backend, with the reason).

    >>> cache, table = jnp.ones((1, 2, 3, 64, 16)), jnp.array([[2, 0, 1]])
    >>> q, length = jnp.ones((1, 4, 16)), jnp.array([70])
    >>> out, lse = grouped_decode(q, cache, cache, table, length, sm_scale=0.25)
    >>> out.shape, lse.shape
    ((1, 4, 16), (1, 4))
    """
    _check(q, {"k_cache": k_cache, "v_cache": v_cache}, block_table, length)
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[1], mask.shape[-1:])
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: got {num_splits}, expected None or at least 1")
    chosen = choose("grouped_decode", BACKENDS, problem_of(q, k_cache), backend)
    return chosen.run(
        *(q, k_cache, v_cache, block_table, length, mask, jnp.asarray(sm_scale, jnp.float32)),
        num_splits=num_splits,
        deterministic=deterministic,
        interpret=interpret,
    )
