"""The backward pass of causal prefill as two Pallas kernels, lowered through Triton.

With p = softmax of the scaled scores, natural logarithms, and cotangents dout and dlse (the
latter of the base-2 log-sum-exp, whose own derivative by a score is p / ln 2):

    dp = dout v^T,    ds = p (dp - delta),    delta = sum(out dout) - dlse / ln 2
    dv = p^T dout,    dk = ds^T q sm_scale,   dq = ds k sm_scale

Both kernels compute p again from the scores and lse. One owns a tile of queries and passes over
its keys; the other owns a tile of keys, whose rows may belong to several requests or to none, and
passes over the queries of each request that it meets. So nothing is summed atomically.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.causal_prefill.blocks import (
    columns,
    dot,
    dot_parts,
    load_rows,
    store_rows,
)
from pallas_kernels.causal_prefill.tiles import (
    BackwardTiles,
    CausalTiles,
    QueryTiles,
    plan_query_tiles,
)
from pallas_kernels.exponential import LOG2_E, NEG_INF, exp2


def _load(ref, head, row, mask=None):
    """[H, T] values of the rows `row`; where not `mask`, zeros."""
    return plgpu.load(ref.at[head, row], mask=mask, other=None if mask is None else 0.0)


def _zero_parts(rows: int, width: int):
    return tuple(jnp.zeros((rows, size), jnp.float32) for _, size in columns(width))


def _dq_kernel(
    q_ref,  # [T, H, D], in device memory, as all
    k_ref,  # [K, H, D]
    v_ref,  # [K, H, V]
    dout_ref,  # [T, H, V]
    lse_ref,  # [H, T]
    delta_ref,  # [H, T]
    scale_ref,  # [1]
    *plan_and_results,  # the QueryTiles, then dq [T, H, D]
    tiles: CausalTiles,
    causal: bool,
    interpret: bool,
):
    *plan_refs, dq_ref = plan_and_results
    head, tile = pl.program_id(0), pl.program_id(1)
    plan = QueryTiles(*(ref[tile] for ref in plan_refs))
    scale = scale_ref[0] * LOG2_E

    row = plan.first + jnp.arange(tiles.rows)
    visible = jnp.where(row < plan.query_stop, plan.shift + (row if causal else 0), 0)
    sees = visible > 0
    q = load_rows(q_ref, head, row, sees)
    dout = load_rows(dout_ref, head, row, sees)
    lse = _load(lse_ref, head, row, sees)[:, None]
    delta = _load(delta_ref, head, row, sees)[:, None]

    def step(block, dq, masked):
        position = block * tiles.keys + jnp.arange(tiles.keys)
        in_request = position < plan.seen if masked else None
        k = load_rows(k_ref, head, plan.key_start + position, in_request)
        v = load_rows(v_ref, head, plan.key_start + position, in_request)

        s = dot_parts(q, k)
        if masked:
            s = jnp.where(position[None, :] < visible[:, None], s, NEG_INF)
        p = exp2(s * scale - lse, interpret)
        ds = (p * (dot_parts(dout, v) - delta)).astype(q_ref.dtype)
        return tuple(acc + dot(ds, part) for acc, part in zip(dq, k, strict=True))

    dq = _zero_parts(tiles.rows, q_ref.shape[2])
    unmasked = plan.whole // tiles.keys
    dq = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), dq)
    end = pl.cdiv(plan.seen, tiles.keys)
    dq = lax.fori_loop(unmasked, end, functools.partial(step, masked=True), dq)
    dq = tuple(part * scale_ref[0] for part in dq)
    store_rows(dq_ref, head, row, row < plan.stop, dq)


def _dkv_kernel(
    q_ref,  # [T, H, D], in device memory, as all
    k_ref,  # [K, H, D]
    v_ref,  # [K, H, V]
    dout_ref,  # [T, H, V]
    lse_ref,  # [H, T]
    delta_ref,  # [H, T]
    scale_ref,  # [1]
    q_start_ref,  # [B]
    q_count_ref,  # [B]
    kv_start_ref,  # [B]
    kv_count_ref,  # [B]
    dk_ref,  # [K, H, D]
    dv_ref,  # [K, H, V]
    *,
    tiles: CausalTiles,
    causal: bool,
    interpret: bool,
):
    head, tile = pl.program_id(0), pl.program_id(1)
    scale = scale_ref[0] * LOG2_E
    first_key = tile * tiles.keys
    key_row = first_key + jnp.arange(tiles.keys)
    exists = key_row < k_ref.shape[0]
    k = load_rows(k_ref, head, key_row, exists)
    v = load_rows(v_ref, head, key_row, exists)

    def add_request(request, carry):
        start, n = q_start_ref[request], q_count_ref[request]
        m = kv_count_ref[request]
        first = first_key - kv_start_ref[request]  # the tile's first position, if it is inside
        position = first + jnp.arange(tiles.keys)

        # Blocks of queries end where the request does, so that the partial one comes first, and
        # with it all that need a mask. Query i sees the keys before i + reach.
        blocks = pl.cdiv(n, tiles.rows)
        missing = blocks * tiles.rows - n
        reach = m - n + 1
        meets = (first < m) & (first + tiles.keys > 0)
        inside = (first >= 0) & (first + tiles.keys <= m)
        sees_one = jnp.maximum(jnp.maximum(first, 0) + 1 - reach, 0) if causal else 0
        sees_all = jnp.maximum(first + tiles.keys - reach, 0) if causal else 0
        begin = jnp.where(meets, (sees_one + missing) // tiles.rows, blocks)
        unmasked = jnp.where(inside, pl.cdiv(sees_all + missing, tiles.rows), blocks)
        unmasked = jnp.clip(unmasked, begin, blocks)

        def step(block, carry, masked):
            dk, dv = carry
            query = block * tiles.rows - missing + jnp.arange(tiles.rows)
            sees = None
            if masked:
                visible = jnp.where(query >= 0, query + reach if causal else m, 0)
                sees = visible > 0
            q = load_rows(q_ref, head, start + query, sees)
            dout = load_rows(dout_ref, head, start + query, sees)
            lse = _load(lse_ref, head, start + query, sees)
            delta = _load(delta_ref, head, start + query, sees)

            # Transposed, [keys, rows], as the products below want them.
            s = dot_parts(k, q)
            if masked:
                mask = (position[:, None] >= 0) & (position[:, None] < visible[None, :])
                s = jnp.where(mask, s, NEG_INF)
            p = exp2(s * scale - lse[None, :], interpret)
            # Before ds: then p need not be held.
            p_low = p.astype(q_ref.dtype)
            dv = tuple(acc + dot(p_low, part) for acc, part in zip(dv, dout, strict=True))
            ds = p * (dot_parts(v, dout) - delta[None, :])
            if masked:
                # Rows of v in no request may hold NaN.
                ds = jnp.where(mask, ds, 0.0)
            ds = ds.astype(q_ref.dtype)
            dk = tuple(acc + dot(ds, part) for acc, part in zip(dk, q, strict=True))
            return dk, dv

        carry = lax.fori_loop(begin, unmasked, functools.partial(step, masked=True), carry)
        return lax.fori_loop(unmasked, blocks, functools.partial(step, masked=False), carry)

    carry = (
        _zero_parts(tiles.keys, k_ref.shape[2]),
        _zero_parts(tiles.keys, v_ref.shape[2]),
    )
    dk, dv = lax.fori_loop(0, q_start_ref.shape[0], add_request, carry)
    store_rows(dk_ref, head, key_row, exists, tuple(part * scale_ref[0] for part in dk))
    store_rows(dv_ref, head, key_row, exists, dv)


def causal_prefill_backward(
    q: Array,
    k: Array,
    v: Array,
    q_start: Array,
    q_count: Array,
    kv_start: Array,
    kv_count: Array,
    sm_scale: Array,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    *,
    causal: bool,
    interpret: bool,
    tiles: BackwardTiles,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), each of its argument's dtype."""
    tokens, heads, _ = q.shape
    ranges = (q_start, q_count, kv_start, kv_count)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1) - dlse * LOG2_E
    # Transposed: a block reads those of consecutive rows of one head.
    operands = (q, k, v, dout, lse.T, delta.T, sm_scale.reshape(1))
    whole = pl.BlockSpec(memory_space=pl.ANY)

    def launch(kernel, name, tiles, grid, extra, results):
        return pl.pallas_call(
            functools.partial(kernel, tiles=tiles, causal=causal, interpret=interpret),
            grid=grid,
            in_specs=[whole] * (len(operands) + len(extra)),
            out_specs=[whole] * len(results),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            compiler_params=plgpu.CompilerParams(
                num_warps=tiles.num_warps, num_stages=tiles.num_stages
            ),
            interpret=interpret,
            name=name,
        )(*operands, *extra)

    plan = plan_query_tiles(*ranges, tokens=tokens, rows=tiles.dq.rows, causal=causal)
    grid = (heads, plan.first.shape[0])
    (dq,) = launch(_dq_kernel, "mla_causal_prefill_dq", tiles.dq, grid, plan, (q,))
    grid = (heads, pl.cdiv(k.shape[0], tiles.dkv.keys))
    dk, dv = launch(_dkv_kernel, "mla_causal_prefill_dkv", tiles.dkv, grid, ranges, (k, v))
    return dq, dk, dv
