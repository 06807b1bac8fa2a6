"""The one entry of sparse prefill: whole prompts, a layout of 64 x 64 blocks, masks, paged keys."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.grouped_attention.blocks import BLOCK, DTYPES
from pallas_kernels.grouped_attention.checks import axes, check_mask
from pallas_kernels.sparse_prefill.reference import sparse_prefill_reference
from pallas_kernels.sparse_prefill.tiles import SparseProblem, unsupported
from pallas_kernels.sparse_prefill.triton import sparse_prefill_triton

# Fastest first.
BACKENDS = (
    Backend(
        name="triton",
        run=sparse_prefill_triton,
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, causal, interpret: sparse_prefill_reference(*args, causal=causal),
    ),
)


def _check_keys(q: Array, keys: dict[str, Array], block_table: Array | None) -> None:
    """ValueError for shapes, TypeError for dtypes, of q, k, v and the table."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: got shape {q.shape}, expected [batch, heads, tokens, width]")
    batch, heads, tokens, width = q.shape
    k, blocks = keys["k"], -(-tokens // BLOCK)
    kv_heads = k.shape[1] if k.ndim > 1 else 0
    stored = (tokens,)
    if block_table is not None:
        stored = (max(k.shape[2] if k.ndim > 2 else 0, blocks), BLOCK)
    for name, array in keys.items():
        want = (batch, kv_heads, *stored, width)
        if array.shape != want or kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"{name}: got shape {array.shape}, expected "
                f"{axes(batch, f'a divisor of {heads}', *stored, width)}, k's and v's alike"
            )
        if array.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {q.dtype}, q's")
    if str(q.dtype) not in DTYPES:
        raise TypeError(f"q: got dtype {q.dtype}, expected one of {', '.join(DTYPES)}")
    if block_table is None:
        return
    if block_table.shape != (batch, stored[0]):
        raise ValueError(
            f"block_table: got shape {block_table.shape}, expected {axes(batch, stored[0])}"
        )
    if block_table.dtype != jnp.int32:
        raise TypeError(f"block_table: got dtype {block_table.dtype}, expected int32")


def _leading_axes(layout: Array, q: Array) -> tuple[int, int]:
    """[1 or batch, 1 or heads] of a layout of any of the three forms; else an error."""
    batch, heads, tokens, _ = q.shape
    square = (-(-tokens // BLOCK),) * 2
    forms = {
        square: (1, 1),
        (batch, *square): (batch, 1),
        (batch, 1, *square): (batch, 1),
        (batch, heads, *square): (batch, heads),
    }
    if layout.shape not in forms:
        raise ValueError(
            f"layout: got shape {layout.shape}, expected {axes(*square)}, {axes(batch, *square)} "
            f"or {axes(batch, f'1 or {heads}', *square)}, a block for {BLOCK} of {tokens} tokens"
        )
    if layout.dtype != jnp.bool_:
        raise TypeError(f"layout: got dtype {layout.dtype}, expected bool")
    return forms[layout.shape]


def sparse_prefill(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads *tokens width"],
    v: Float[Array, "batch kv_heads *tokens width"],
    *,
    layout: Bool[Array, "*leading blocks blocks"] | None = None,
    mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None = None,
    block_table: Int[Array, "batch blocks"] | None = None,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch heads tokens width"], Float[Array, "batch heads tokens"]]:
    """Attention of prompts of one length; heads in groups; blocks of keys that a layout skips.

    Query head h reads key head h // (heads / kv_heads). Query i sees key j if j <= i (`causal`), if
    `layout` [blocks, blocks], [batch, ..] or [batch, 1 or heads, ..] has the block (i // 64,
    j // 64), and if `mask` [batch, 1 or heads, rows, keys] (tokens or more of both) keeps it: True
    keeps, a float is added to the scaled scores. A block that the layout or causality leaves out
    costs neither loads nor arithmetic. With `block_table` [batch, blocks], k and v are
    [batch, kv_heads, blocks, 64, width], and block_table[b, j] is where the j-th 64 tokens lie;
    slots behind the tokens and entries behind the last used one may hold anything, and ids out of
    range are clamped. Scores are q k^T * sm_scale in float32. Everything but shapes may be traced.

    Returns out [batch, heads, tokens, width] of q's dtype (bfloat16 for float8_e4m3fn) and the
    base-2 log-sum-exp [batch, heads, tokens] float32; a query that sees no key gives 0 and -inf.
    Errors: ValueError (shape), TypeError (dtype), NotImplementedError (backend, with the reason).

    >>> q, k = jnp.ones((1, 4, 130, 16)), jnp.ones((1, 2, 130, 16))
    >>> out, lse = sparse_prefill(q, k, k, layout=jnp.eye(3, dtype=bool), sm_scale=0.25)
    >>> out.shape, lse.shape
    ((1, 4, 130, 16), (1, 4, 130))
    """
    _check_keys(q, {"k": k, "v": v}, block_table)
    batch, heads, tokens, _ = q.shape
    if layout is not None:
        layout = layout.reshape(*_leading_axes(layout, q), *layout.shape[-2:])
    if mask is not None:
        check_mask(mask, batch, heads, tuple(max(size, tokens) for size in mask.shape[2:]))
    problem = SparseProblem.of(q, k, layout, mask, block_table, causal)
    chosen = choose("sparse_prefill", BACKENDS, problem, backend)
    return chosen.run(
        *(q, k, v, layout, mask, block_table, jnp.asarray(sm_scale, jnp.float32)),
        causal=causal,
        interpret=interpret,
    )
