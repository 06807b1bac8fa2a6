"""Causal prefill as a Pallas kernel, lowered through Triton: flash attention over ragged rows.

One block owns a tile of one request's queries in one head, and passes over the keys that they see
with a running softmax. Blocks of keys that all of the tile's queries see come first, without a
mask; the diagonal and the request's end follow.

Source: Dao, "FlashAttention-2" (2023), for both passes.

Legend: s scores before scaling; m running maximum of the scaled ones, l running sum of
exponentials, both in base 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_prefill.blocks import (
    dot,
    dot_parts,
    load_rows,
    store_rows,
)
from pallas_kernels.causal_prefill.tiles import (
    BackwardTiles,
    CausalProblem,
    CausalTiles,
    QueryTiles,
    choose_backward_tiles,
    choose_tiles,
    plan_query_tiles,
)
from pallas_kernels.causal_prefill.triton_backward import causal_prefill_backward
from pallas_kernels.device import current_device
from pallas_kernels.exponential import LOG2_E, NEG_INF, exp2


def _forward_kernel(
    q_ref,  # [T, H, D], in device memory, as all
    k_ref,  # [K, H, D]
    v_ref,  # [K, H, V]
    scale_ref,  # [1]
    *plan_and_results,  # the QueryTiles, then out [T, H, V] and lse [T, H]
    tiles: CausalTiles,
    causal: bool,
    interpret: bool,
):
    *plan_refs, out_ref, lse_ref = plan_and_results
    head, tile = pl.program_id(0), pl.program_id(1)
    plan = QueryTiles(*(ref[tile] for ref in plan_refs))
    scale = scale_ref[0] * LOG2_E

    row = plan.first + jnp.arange(tiles.rows)
    is_query = row < plan.query_stop
    visible = jnp.where(is_query, plan.shift + (row if causal else 0), 0)
    q = load_rows(q_ref, head, row, is_query)

    def attend(block, carry, masked):
        acc, m, l = carry
        position = block * tiles.keys + jnp.arange(tiles.keys)
        in_request = position < plan.seen if masked else None
        k = load_rows(k_ref, head, plan.key_start + position, in_request)
        (v,) = load_rows(v_ref, head, plan.key_start + position, in_request)

        s = dot_parts(q, k)
        if masked:
            s = jnp.where(position[None, :] < visible[:, None], s, NEG_INF)
        new_m = jnp.maximum(m, jnp.max(s, axis=1) * scale)
        # A row that has seen no key yet keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m) if masked else new_m
        p = exp2(s * scale - shift[:, None], interpret)
        keep = exp2(m - shift, interpret)
        acc = acc * keep[:, None] + dot(p.astype(v.dtype), v)
        return acc, new_m, l * keep + jnp.sum(p, axis=1)

    carry = (
        jnp.zeros((tiles.rows, v_ref.shape[2]), jnp.float32),
        jnp.full((tiles.rows,), NEG_INF, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
    )
    unmasked = plan.whole // tiles.keys
    carry = lax.fori_loop(0, unmasked, functools.partial(attend, masked=False), carry)
    end = pl.cdiv(plan.seen, tiles.keys)
    acc, m, l = lax.fori_loop(unmasked, end, functools.partial(attend, masked=True), carry)

    empty = visible <= 0
    l = jnp.where(empty, 1.0, l)
    owned = row < plan.stop
    out = jnp.where(empty[:, None], 0.0, acc / l[:, None])
    store_rows(out_ref, head, row, owned, (out,))
    lse = jnp.where(empty, NEG_INF, m + jnp.log2(l))
    plgpu.store(lse_ref.at[row, head], lse, mask=owned)


def causal_prefill_forward(
    q: Array,
    k: Array,
    v: Array,
    q_start: Array,
    q_count: Array,
    kv_start: Array,
    kv_count: Array,
    sm_scale: Array,
    *,
    causal: bool,
    interpret: bool,
    tiles: CausalTiles,
) -> tuple[Array, Array]:
    """(out, lse) of one forward launch."""
    tokens, heads, _ = q.shape
    plan = plan_query_tiles(
        *(q_start, q_count, kv_start, kv_count), tokens=tokens, rows=tiles.rows, causal=causal
    )
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_forward_kernel, tiles=tiles, causal=causal, interpret=interpret),
        grid=(heads, plan.first.shape[0]),
        in_specs=[whole] * (4 + len(plan)),
        out_specs=[whole] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((tokens, heads, v.shape[2]), q.dtype),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_causal_prefill",
    )(q, k, v, sm_scale.reshape(1), *plan)


def _primal(
    q, k, v, q_start, q_count, kv_start, kv_count, sm_scale, causal, interpret, tiles, backward
):
    del backward
    return causal_prefill_forward(
        *(q, k, v, q_start, q_count, kv_start, kv_count, sm_scale),
        causal=causal,
        interpret=interpret,
        tiles=tiles,
    )


def _attend_forward(*args):
    out, lse = _primal(*args)
    return (out, lse), (*args[:8], out, lse)


def _attend_backward(causal, interpret, tiles, backward, residuals, cotangents):
    del tiles
    dq, dk, dv = causal_prefill_backward(
        *residuals, *cotangents, causal=causal, interpret=interpret, tiles=backward
    )
    # Ranges are integers, and the scale is a constant: neither has a gradient.
    return dq, dk, dv, None, None, None, None, None


_attend = jax.custom_vjp(_primal, nondiff_argnums=(8, 9, 10, 11))
_attend.defvjp(_attend_forward, _attend_backward)


def causal_prefill_triton(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "keys heads width"],
    v: Float[Array, "keys heads value_width"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    kv_start: Int[Array, " batch"],
    kv_count: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    *,
    causal: bool,
    interpret: bool,
    tiles: CausalTiles | None = None,
    backward_tiles: BackwardTiles | None = None,
) -> tuple[Float[Array, "tokens heads value_width"], Float[Array, "tokens heads"]]:
    """`causal_prefill` on the Triton lowering; tiles override the choice, for tuning."""
    problem = CausalProblem.of(q, k, v, q_start, causal)
    return _attend(
        *(q, k, v, q_start, q_count, kv_start, kv_count, sm_scale),
        causal,
        interpret,
        tiles or choose_tiles(problem, current_device()),
        backward_tiles or choose_backward_tiles(problem),
    )
