"""Grouped decode as a Pallas kernel, lowered through Triton: flash decoding over 64-token blocks.

A block of the launch takes the query heads that share one key head of a request, and a segment of
its keys, as the split plan tells it. Parts of a split request are put together by paged attention's
merge.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.causal_prefill.blocks import dot_parts, store_parts
from pallas_kernels.device import current_device
from pallas_kernels.exponential import LOG2_E, NEG_INF
from pallas_kernels.grouped_attention.blocks import (
    BLOCK,
    Running,
    apply_mask,
    as_loadable,
    compute_dtype,
    load_block,
    mask_bytes,
)
from pallas_kernels.grouped_decode.tiles import choose_tiles, problem_of
from pallas_kernels.paged_attention import PagedTiles, Units, Work, most_slots, pack
from pallas_kernels.paged_attention.merge import merge_parts
from pallas_kernels.paged_attention.units import Segment
from pallas_kernels.paged_decode.triton import plan_splits


def _kernel(
    q_ref,  # [1, B * Hq, D], in device memory, as all
    k_ref,  # [B * Hk * blocks, 64, D]
    v_ref,  # as k_ref
    table_ref,  # [B, blocks]
    scale_ref,  # [1]
    segments_ref,  # [segments, 10]
    *refs,  # a mask [B * mask heads, keys], if any; the results
    tiles: PagedTiles,
    group: int,
    interpret: bool,
):
    *mask_refs, out_ref, lse_ref, part_ref, part_lse_ref = refs
    row_block, index = pl.program_id(0), pl.program_id(1)
    segment = Segment(*(segments_ref[index, i] for i in range(len(Segment._fields))))

    @pl.when(segment.owned > 0)
    def _():
        row = row_block * tiles.rows + jnp.arange(tiles.rows)
        # Rows behind the group's repeat its last one: a mask would slow the load down.
        head = segment.base + jnp.minimum(row, group - 1)
        running = _attend(
            *(segment, head, q_ref, k_ref, v_ref, table_ref, scale_ref, mask_refs),
            tiles=tiles,
            group=group,
            interpret=interpret,
        )
        out, lse = running.finish()
        owned = row < group

        @pl.when(segment.slot < 0)
        def _():
            store_parts(out_ref, (segment.base + row[:, None],), owned, out)
            plgpu.store(lse_ref.at[segment.base + row], lse, mask=owned)

        @pl.when(segment.slot >= 0)
        def _():
            slot_row = segment.slot * pl.num_programs(0) * tiles.rows + row
            store_parts(part_ref, (slot_row[:, None],), owned, out)
            plgpu.store(part_lse_ref.at[slot_row], lse, mask=owned)


def _attend(
    segment: Segment,
    head,
    q_ref,
    k_ref,
    v_ref,
    table_ref,
    scale_ref,
    mask_refs,
    *,
    tiles: PagedTiles,
    group: int,
    interpret: bool,
) -> Running:
    """The running softmax of query heads `head` over the segment's keys."""
    keys, blocks = tiles.keys, table_ref.shape[1]
    unit = segment.base // group
    scale = scale_ref[0] * LOG2_E
    q = load_block(q_ref, 0, head)

    def page_of(step):
        slot = jnp.minimum(step * keys // BLOCK, blocks - 1)
        found = table_ref[segment.first_id, slot]
        return unit * blocks + jnp.clip(found, 0, blocks - 1)

    def step(i, carry, masked):
        running, page = carry
        position = i * keys + jnp.arange(keys)
        in_length = position < segment.length
        present = in_length if masked else None
        row = i * keys % BLOCK + jnp.arange(keys)
        k = load_block(k_ref, page, row, present)
        v = load_block(v_ref, page, row, present)
        # A step ahead: this load, then the block's, one after the other would be too late.
        page = page_of(i + 1)

        s = dot_parts(q, k) * scale
        for mask_ref in mask_refs:
            mask_row = head // (q_ref.shape[1] // mask_ref.shape[0])
            s = apply_mask(s, mask_ref, (mask_row,), position, in_length[None, :])
        if masked:
            s = jnp.where(in_length[None, :], s, NEG_INF)
        return running.add(s, v, masked=masked, interpret=interpret), page

    carry = Running.empty(tiles.rows, q_ref.shape[2]), page_of(segment.begin)
    begin, whole = segment.begin, segment.begin
    if not (mask_refs or tiles.mask_all):
        # Blocks that are full need no mask.
        whole = jnp.clip(segment.length // keys, begin, segment.end)
        carry = lax.fori_loop(begin, whole, functools.partial(step, masked=False), carry)
    running, _ = lax.fori_loop(whole, segment.end, functools.partial(step, masked=True), carry)
    return running


def grouped_decode_triton(
    q: Float[Array, "batch heads width"],
    k_cache: Float[Array, "batch kv_heads blocks block width"],
    v_cache: Float[Array, "batch kv_heads blocks block width"],
    block_table: Int[Array, "batch blocks"],
    length: Int[Array, " batch"],
    mask: Bool[Array, "batch mask_heads keys"] | Float[Array, "batch mask_heads keys"] | None,
    sm_scale: Float[Array, ""],
    *,
    num_splits: int | None,
    deterministic: bool,
    interpret: bool,
    tiles: PagedTiles | None = None,
) -> tuple[Float[Array, "batch heads width"], Float[Array, "batch heads"]]:
    """`grouped_decode` on the Triton lowering; `tiles` overrides the choice, for tuning."""
    batch, heads, _ = q.shape
    kv_heads, blocks = k_cache.shape[1:3]
    problem, device = problem_of(q, k_cache), current_device()
    tiles = tiles or choose_tiles(problem, device, mask_bytes(mask))
    # Garbage in traced lengths must not lead outside the arrays.
    most = blocks * BLOCK if mask is None else min(blocks * BLOCK, mask.shape[2])
    length = jnp.repeat(jnp.clip(length, 0, most), kv_heads)
    unit = jnp.arange(batch * kv_heads, dtype=jnp.int32)
    rows = jnp.full_like(unit, problem.rows)
    units = Units(
        base=unit * problem.rows,
        offset=jnp.zeros_like(unit),
        rows=rows,
        owned=rows,
        first_id=unit // kv_heads,
        length=length,
        seen=length,
    )
    plan = plan_splits(
        length, problem, tiles, device, num_splits=num_splits, deterministic=deterministic
    )
    out, lse = _launch(
        *(q, k_cache, v_cache, block_table, sm_scale, mask, pack(units, plan)),
        slots=most_slots(plan.unit.shape[0], batch * kv_heads),
        tiles=tiles,
        deterministic=deterministic,
        interpret=interpret,
    )
    return out.reshape(q.shape), lse.reshape(batch, heads)


def _launch(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    sm_scale: Array,
    mask: Array | None,
    work: Work,
    *,
    slots: int,
    tiles: PagedTiles,
    deterministic: bool,
    interpret: bool,
) -> tuple[Float[Array, "rows width"], Float[Array, " rows"]]:
    """(out, base-2 lse) of all query heads: one launch for the segments, one for the merge."""
    width, group = q.shape[2], q.shape[1] // k_cache.shape[1]
    total = q.shape[0] * q.shape[1]
    # The merge takes rows in powers of two: behind a head of 192 are 64 columns that nobody reads.
    held = pl.next_power_of_2(width)
    row_blocks = pl.cdiv(group, tiles.rows)
    slot_rows = row_blocks * tiles.rows
    scratch = max(slots, 1) * slot_rows
    args = [
        q.reshape(1, total, width),
        *(lax.collapse(cache, 0, 3) for cache in (k_cache, v_cache)),
        *(block_table, sm_scale.reshape(1), work.segments),
        *(() if mask is None else (as_loadable(lax.collapse(mask, 0, 2)),)),
    ]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out, lse, part, part_lse = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, group=group, interpret=interpret),
        grid=(row_blocks, work.segments.shape[0]),
        in_specs=[whole] * len(args),
        out_specs=[whole] * 4,
        out_shape=[
            jax.ShapeDtypeStruct((total, held), compute_dtype(q.dtype)),
            jax.ShapeDtypeStruct((total,), jnp.float32),
            jax.ShapeDtypeStruct((scratch, held), jnp.float32),
            jax.ShapeDtypeStruct((scratch,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_grouped_decode",
    )(*args)
    if slots:  # without, there are as many segments as units: none is split
        out, lse = merge_parts(
            *(out, lse, part, part_lse, work.merges, work.splits),
            slot_rows=slot_rows,
            deterministic=deterministic,
            interpret=interpret,
        )
    return out[:, :width], lse
