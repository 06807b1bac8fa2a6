"""Sparse prefill as a Pallas kernel, lowered through Triton: flash attention over listed blocks.

One block owns a tile of queries of one head and passes over the blocks of keys that they see with a
running softmax: all of them, those up to the diagonal, or those that a layout's list names. Keys
lie one after the other, or in blocks that a table names.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.causal_prefill.blocks import dot_parts, store_parts
from pallas_kernels.causal_prefill.tiles import CausalTiles
from pallas_kernels.device import current_device
from pallas_kernels.exponential import LOG2_E, NEG_INF
from pallas_kernels.grouped_attention.blocks import (
    BLOCK,
    Running,
    apply_mask,
    as_loadable,
    compute_dtype,
    load_block,
)
from pallas_kernels.sparse_prefill.tiles import SparseProblem, Visits, choose_tiles, plan_visits


def _kernel(
    q_ref,  # [B * Hq, P, D], in device memory, as all
    k_ref,  # [B * Hk, keys, D]
    v_ref,  # as k_ref
    scale_ref,  # [1]
    *refs,  # a table, the visits and a mask, as far as there are; the results
    problem: SparseProblem,
    tiles: CausalTiles,
    interpret: bool,
):
    *given, out_ref, lse_ref = refs
    table_ref = given.pop(0) if problem.paged else None
    visits = Visits(given.pop(0), given.pop(0)) if problem.sparse else None
    mask_ref = given.pop(0) if problem.mask is not None else None
    # The last queries see most keys under a causal mask: they start first.
    head, tile = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    row = tile * tiles.rows + jnp.arange(tiles.rows)
    is_query = row < problem.tokens
    find = functools.partial(_find_block, visits, table_ref, head, tile, problem, tiles)

    q = load_block(q_ref, head, row, is_query)
    kv_head = head // (problem.heads // problem.kv_heads)
    scale = scale_ref[0] * LOG2_E

    def step(i, carry, masked):
        running, logical, physical = carry
        offset = lax.rem(i * tiles.keys, BLOCK) + jnp.arange(tiles.keys)
        position = logical * BLOCK + offset
        in_prompt = position < problem.tokens
        present = in_prompt if masked else None
        k = load_block(k_ref, kv_head, physical * BLOCK + offset, present)
        v = load_block(v_ref, kv_head, physical * BLOCK + offset, present)
        # A step ahead: these loads, then the block's, one after the other would be too late.
        logical, physical = find(i + 1)

        s = dot_parts(q, k) * scale
        if mask_ref is not None:
            index = _head_in(head, problem.mask, problem.heads), row
            inside = is_query[:, None] & in_prompt[None, :]
            s = apply_mask(s, mask_ref, index, position, inside)
        if masked:
            limit = row + 1 if problem.causal else jnp.full_like(row, problem.tokens)
            s = jnp.where(position[None, :] < limit[:, None], s, NEG_INF)
        return running.add(s, v, masked=masked, interpret=interpret), logical, physical

    whole, end = _steps(visits, head, tile, problem, tiles)
    carry = Running.empty(tiles.rows, problem.width), *find(0)
    if mask_ref is None:
        carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)
    out, lse = carry[0].finish()
    store_parts(out_ref, (head, row[:, None]), is_query, out)
    plgpu.store(lse_ref.at[head, row], lse, mask=is_query)


def _head_in(head, leading, heads: int):
    """Where a query head's array stands among those of [1 or batch, 1 or heads]."""
    batch, number = leading
    request = head // heads if batch > 1 else 0
    return request * number + (head % heads if number > 1 else 0)


def _layout_row(head, tile, problem: SparseProblem, tiles: CausalTiles):
    """Which list of visits is this tile's."""
    return _head_in(head, problem.layout, problem.heads), tile * tiles.rows // BLOCK


def _steps(visits, head, tile, problem: SparseProblem, tiles: CausalTiles):
    """(steps that all queries see whole, all steps): the rest, at the list's end, needs a mask."""
    if visits is not None:
        per_block = BLOCK // tiles.keys
        count = visits.count[_layout_row(head, tile, problem, tiles)]
        # Only the last block can be the diagonal's or the prompt's last one.
        whole, end = jnp.maximum(count - 1, 0) * per_block, count * per_block
    else:
        first = tile * tiles.rows
        seen = jnp.minimum(first + tiles.rows, problem.tokens) if problem.causal else problem.tokens
        whole = (first if problem.causal else problem.tokens) // tiles.keys
        end = pl.cdiv(seen, tiles.keys)
    return (whole if problem.mask is None else 0), end


def _find_block(visits, table_ref, head, tile, problem: SparseProblem, tiles: CausalTiles, step):
    """(which 64 tokens, where they lie in units of 64 rows) of a step, ids clamped."""
    slot = step * tiles.keys // BLOCK
    last = pl.cdiv(problem.tokens, BLOCK) - 1
    logical = slot
    if visits is not None:
        listed = visits.block[*_layout_row(head, tile, problem, tiles), jnp.minimum(slot, last)]
        logical = jnp.minimum(listed, last)
    if table_ref is None:
        return logical, logical
    physical = table_ref[head // problem.heads, jnp.minimum(logical, last)]
    return logical, jnp.clip(physical, 0, table_ref.shape[1] - 1)


def sparse_prefill_triton(
    q: Float[Array, "batch heads tokens width"],
    k: Float[Array, "batch kv_heads *tokens width"],
    v: Float[Array, "batch kv_heads *tokens width"],
    layout: Bool[Array, "layout_batch layout_heads blocks blocks"] | None,
    mask: Bool[Array, "batch mask_heads rows keys"]
    | Float[Array, "batch mask_heads rows keys"]
    | None,
    block_table: Int[Array, "batch blocks"] | None,
    sm_scale: Float[Array, ""],
    *,
    causal: bool,
    interpret: bool,
    tiles: CausalTiles | None = None,
) -> tuple[Float[Array, "batch heads tokens width"], Float[Array, "batch heads tokens"]]:
    """`sparse_prefill` on the Triton lowering; `tiles` overrides the choice, for tuning."""
    batch, heads, tokens, width = q.shape
    problem = SparseProblem.of(q, k, layout, mask, block_table, causal)
    tiles = tiles or choose_tiles(problem, current_device())
    visits = () if layout is None else plan_visits(lax.collapse(layout, 0, 2), causal)
    args = [
        lax.collapse(q, 0, 2),
        *(x.reshape(batch * problem.kv_heads, -1, width) for x in (k, v)),
        sm_scale.reshape(1),
        *(() if block_table is None else (block_table,)),
        *visits,
        *(() if mask is None else (as_loadable(lax.collapse(mask, 0, 2)),)),
    ]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, problem=problem, tiles=tiles, interpret=interpret),
        grid=(batch * heads, pl.cdiv(tokens, tiles.rows)),
        in_specs=[whole] * len(args),
        out_specs=[whole] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((batch * heads, tokens, width), compute_dtype(q.dtype)),
            jax.ShapeDtypeStruct((batch * heads, tokens), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_sparse_prefill",
    )(*args)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])
