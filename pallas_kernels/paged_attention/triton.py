"""Latent attention over pages as one Pallas kernel, lowered through Triton: decode and prefill.

A block of the launch takes a tile of query rows and a segment of the keys that they see, as the
split plan tells it. It reads the keys once and uses them twice: as keys for the scores, and as
values for the sum. The result of a unit in one segment is written as it is; the parts of a split
one go to scratch, and a second kernel puts them together.

Legend: s scores, m running maximum, l running sum of exponentials, all in base 2; acc the sum of
latents so far.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.exponential import LOG2_E, NEG_INF, exp2
from pallas_kernels.paged_attention.merge import merge_parts
from pallas_kernels.paged_attention.tiles import PagedProblem, PagedTiles
from pallas_kernels.paged_attention.units import Segment, Work
from pallas_kernels.precision import precision_for


def unsupported(problem: PagedProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    for name, size in (("latent", problem.latent), ("rope", problem.rope)):
        if size & (size - 1) or (size < 16 and not (name == "rope" and size == 0)):
            return f"{name} is {size}, the Triton lowering needs a power of two from 16"
    if problem.latent > 512:
        return f"latent is {problem.latent}, a tile holds at most 512"
    return None


def _page_ids(ids_ref, num_pages, page_size, segment, block, keys):
    """The page of a block of keys; of each key, if a block may span pages. Clamped to the pool."""
    token = block * keys
    if page_size % keys:
        token += jnp.arange(keys)
    last = jnp.maximum(pl.cdiv(segment.length, page_size) - 1, 0)
    slot = segment.first_id + jnp.minimum(token // page_size, last)
    return jnp.clip(ids_ref[jnp.clip(slot, 0, ids_ref.shape[0] - 1)], 0, num_pages - 1)


def _load_keys(ref, page, block, keys, present):
    """[keys, width] of a pool; zeros where not `present`, since unused slots may hold NaN.

    None for keys that are all present.
    """
    page_size, width = ref.shape[1:]
    token = block * keys
    if page_size % keys == 0:
        index = (page, pl.ds(token % page_size, keys), slice(None))
    else:
        slot = (token + jnp.arange(keys)) % page_size
        index = (page[:, None], slot[:, None], jnp.arange(width)[None, :])
    if present is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=present[:, None], other=0)


def _kernel(*refs, tiles: PagedTiles, heads: int, rope: bool, interpret: bool):
    inputs, (out_ref, lse_ref, part_ref, part_lse_ref) = list(refs[:-4]), refs[-4:]
    q_refs = [inputs.pop(0) for _ in range(1 + rope)]  # [rows, C], and [rows, R]
    pool_refs = [inputs.pop(0) for _ in range(1 + rope)]  # [pages, page, C], and [.., R]
    ids_ref, scale_ref, segments_ref = inputs[:3]
    row_block, index = pl.program_id(0), pl.program_id(1)
    segment = Segment(*(segments_ref[index, i] for i in range(len(Segment._fields))))

    @pl.when(segment.owned > 0)
    def _():
        _attend(
            *(segment, row_block, q_refs, pool_refs, ids_ref, scale_ref[0] * LOG2_E),
            *(out_ref, lse_ref, part_ref, part_lse_ref),
            tiles=tiles,
            heads=heads,
            interpret=interpret,
        )


def _attend(
    segment: Segment,
    row_block,
    q_refs,
    pool_refs,
    ids_ref,
    scale,
    out_ref,
    lse_ref,
    part_ref,
    part_lse_ref,
    *,
    tiles: PagedTiles,
    heads: int,
    interpret: bool,
):
    num_pages, page_size, latent = pool_refs[0].shape
    keys = tiles.keys
    power = functools.partial(exp2, interpret=interpret)
    dot = functools.partial(plgpu.dot, precision=precision_for(q_refs[0].dtype))
    page_ids = functools.partial(_page_ids, ids_ref, num_pages, page_size, segment, keys=keys)

    # Whole tiles of queries, at the array's end the last one, since a mask on this load slows the
    # kernel down. Rows before or behind the segment's are computed in vain.
    first_row = segment.offset + row_block * tiles.rows
    at = jnp.minimum(segment.base + first_row, q_refs[0].shape[0] - tiles.rows)
    queries = [ref[pl.ds(at, tiles.rows), :] for ref in q_refs]
    lane, column = jnp.arange(tiles.rows), jnp.arange(latent)
    row = at + lane - segment.base
    in_request = row < segment.rows
    owned = (row >= first_row) & (row < segment.owned)
    visible = jnp.minimum(segment.seen + row // heads, segment.length)

    def step(block, carry, masked):
        acc, m, l, page = carry
        position = block * keys + jnp.arange(keys)
        present = position < segment.length if masked else None
        pools = [_load_keys(ref, page, block, keys, present) for ref in pool_refs]
        # A step ahead: this load, then the block's, one after the other would be too late.
        page = page_ids(block=block + 1)

        s = sum(dot(q, k, trans_b=True) for q, k in zip(queries, pools, strict=True)) * scale
        if masked:
            s = jnp.where(position[None, :] < visible[:, None], s, NEG_INF)
        new_m = jnp.maximum(m, jnp.max(s, axis=1))
        # A row that has seen no key keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m) if masked else new_m
        p, keep = power(s - shift[:, None]), power(m - shift)
        acc = acc * keep[:, None] + dot(p.astype(pools[0].dtype), pools[0])
        return acc, new_m, l * keep + jnp.sum(p, axis=1), page

    begin, end = segment.begin, segment.end
    carry = (
        jnp.zeros((tiles.rows, latent), jnp.float32),
        jnp.full((tiles.rows,), NEG_INF, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
        page_ids(block=begin),
    )
    if tiles.mask_all:
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=True), carry)
    else:
        # Blocks that all rows see whole need no mask.
        whole = jnp.minimum(segment.seen + first_row // heads, segment.length) // keys
        whole = jnp.clip(whole, begin, end)
        carry = lax.fori_loop(begin, whole, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)
    acc, m, l, _ = carry
    empty = (l == 0.0) | ~in_request
    l = jnp.where(empty, 1.0, l)
    # A select: a padding row's queries, and so its sum, may be NaN.
    acc = jnp.where(empty[:, None], 0.0, acc / l[:, None])
    lse = jnp.where(empty, NEG_INF, m + jnp.log2(l))

    @pl.when(segment.slot < 0)
    def _():
        index = ((at + lane)[:, None], column[None, :])
        plgpu.store(out_ref.at[index], acc.astype(out_ref.dtype), mask=owned[:, None])
        plgpu.store(lse_ref.at[at + lane], lse, mask=owned)

    @pl.when(segment.slot >= 0)
    def _():
        first = (segment.slot * pl.num_programs(0) + row_block) * tiles.rows - first_row
        index = ((first + row)[:, None], column[None, :])
        plgpu.store(part_ref.at[index], acc, mask=owned[:, None])
        plgpu.store(part_lse_ref.at[first + row], lse, mask=owned)


def attend_segments(
    q_nope: Float[Array, "rows latent"],
    q_pe: Float[Array, "rows rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    sm_scale: Float[Array, ""],
    segments: Int[Array, "segments 10"],
    *,
    slots: int,
    heads: int,
    row_blocks: int,
    tiles: PagedTiles,
    interpret: bool,
) -> tuple[
    Float[Array, "rows latent"],
    Float[Array, " rows"],
    Float[Array, "slot_rows latent"],
    Float[Array, " slot_rows"],
]:
    """(out, base-2 lse) of the segments without a slot, and in float32 those of each slot.

    segments: rows as in `Segment`. Slot i has the row_blocks * tiles.rows rows from that times i
    on, in the order of its unit's. What is no segment's is not written.
    """
    rows, latent = q_nope.shape
    if rows < tiles.rows:
        padding = ((0, tiles.rows - rows), (0, 0))
        q_nope, q_pe = jnp.pad(q_nope, padding), jnp.pad(q_pe, padding)
    rope = q_pe.shape[1] > 0
    with_rope = (q_pe,) if rope else ()
    pools = (ckv_cache, kpe_cache) if rope else (ckv_cache,)
    args = (q_nope, *with_rope, *pools, page_ids, sm_scale.reshape(1), segments)
    scratch = max(slots, 1) * row_blocks * tiles.rows
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, heads=heads, rope=rope, interpret=interpret),
        grid=(row_blocks, segments.shape[0]),
        in_specs=[whole] * len(args),
        out_specs=[whole] * 4,
        out_shape=[
            jax.ShapeDtypeStruct((rows, latent), q_nope.dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((scratch, latent), jnp.float32),
            jax.ShapeDtypeStruct((scratch,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_paged_attention",
    )(*args)


def attend_pages(
    q_nope: Float[Array, "rows latent"],
    q_pe: Float[Array, "rows rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    sm_scale: Float[Array, ""],
    work: Work,
    *,
    slots: int,
    heads: int,
    row_blocks: int,
    tiles: PagedTiles,
    deterministic: bool,
    interpret: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """(out, base-2 lse) of every row that belongs to a unit; the rest is not written.

    A unit has up to row_blocks * tiles.rows rows; each tile of them is a block of its own. slots:
    as many as the parts of split units, at most.
    """
    out, lse, part, part_lse = attend_segments(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, sm_scale, work.segments),
        slots=slots,
        heads=heads,
        row_blocks=row_blocks,
        tiles=tiles,
        interpret=interpret,
    )
    if slots == 0:  # as many segments as units: none is split
        return out, lse
    return merge_parts(
        out,
        lse,
        part,
        part_lse,
        work.merges,
        work.splits,
        slot_rows=row_blocks * tiles.rows,
        deterministic=deterministic,
        interpret=interpret,
    )
