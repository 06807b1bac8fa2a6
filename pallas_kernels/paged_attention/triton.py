"""Latent attention over pages as one Pallas kernel, lowered through Triton: decode and prefill.

A block of the launch takes a tile of query rows and a segment of the keys that they see, as the
split plan tells it. It reads the keys once and uses them twice: as keys for the scores, and as
values for the sum. The result of a unit in one segment is written as it is; the parts of a split
one go to scratch, and a second kernel puts them together.

A float8_e4m3fn cache is converted to the queries' dtype after the load. Scales of slots and groups
of 128 columns multiply these columns' scores and, before the sum over latents, the weights; one
scale for the whole cache multiplies scores and sum.

Legend: s scores, m running maximum, l running sum of exponentials, all in base 2; acc the sum of
latents so far, in the parts that share scales.
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
from pallas_kernels.paged_attention.tiles import (
    PagedProblem,
    PagedTiles,
    latent_parts,
    scaling,
)
from pallas_kernels.paged_attention.units import Segment, Work
from pallas_kernels.precision import FP8, precision_for


def unsupported(problem: PagedProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    for name, size in (("latent", problem.latent), ("rope", problem.rope)):
        if size & (size - 1) or (size < 16 and not (name == "rope" and size == 0)):
            return f"{name} is {size}, the Triton lowering needs a power of two from 16"
    if problem.latent > 512:
        return f"latent is {problem.latent}, a tile holds at most 512"
    return None


def _page_ids(ids_ref, num_pages, page_size, segment, block, keys, sparse):
    """The page of a block of keys; of each key, if a block may span pages.

    Clamped to the pool, but for `sparse` ones: there an id outside it stands for no key.
    """
    token = block * keys
    if page_size % keys:
        token += jnp.arange(keys)
    last = jnp.maximum(pl.cdiv(segment.length, page_size) - 1, 0)
    slot = segment.first_id + jnp.minimum(token // page_size, last)
    page = ids_ref[jnp.clip(slot, 0, ids_ref.shape[0] - 1)]
    return page if sparse else jnp.clip(page, 0, num_pages - 1)


def _load_keys(ref, page, block, keys, present, part, dtype):
    """[keys, size] of a pool, `part` its (start, size) of columns; zeros where not `present`.

    Unused slots may hold NaN. None for keys that are all present.
    """
    page_size, (start, size) = ref.shape[1], part
    token = block * keys
    if page_size % keys == 0:
        index = (page, pl.ds(token % page_size, keys), pl.ds(start, size))
    else:
        slot = (token + jnp.arange(keys)) % page_size
        index = (page[:, None], slot[:, None], start + jnp.arange(size)[None, :])
    if present is None:
        return ref[index].astype(dtype)
    return plgpu.load(ref.at[index], mask=present[:, None], other=0.0).astype(dtype)


def _load_scales(ref, page, block, keys, length):
    """The scales [keys] of each group of columns; zeros for keys that are not there."""
    num_pages, page_size, groups = ref.shape
    token = block * keys + jnp.arange(keys)
    present = (token < length) & (page >= 0) & (page < num_pages)
    at = page, token % page_size
    return tuple(plgpu.load(ref.at[*at, group], mask=present, other=0.0) for group in range(groups))


def _scaled(x, scale):
    return x if scale is None else x * scale


def _kernel(*refs, tiles: PagedTiles, heads: int, rope: bool, sparse: bool, interpret: bool):
    inputs, (out_ref, lse_ref, part_ref, part_lse_ref) = list(refs[:-4]), refs[-4:]
    q_refs = [inputs.pop(0) for _ in range(1 + rope)]  # [rows, C], and [rows, R]
    pool_refs = [inputs.pop(0) for _ in range(1 + rope)]  # [pages, page, C], and [.., R]
    ids_ref, scale_ref, segments_ref, *slot_scale_refs = inputs  # .. [pages, page, groups], if any
    row_block, index = pl.program_id(0), pl.program_id(1)
    segment = Segment(*(segments_ref[index, i] for i in range(len(Segment._fields))))

    @pl.when(segment.owned > 0)
    def _():
        _attend(
            *(segment, row_block, q_refs, pool_refs, slot_scale_refs, ids_ref, scale_ref),
            *(out_ref, lse_ref, part_ref, part_lse_ref),
            tiles=tiles,
            heads=heads,
            sparse=sparse,
            interpret=interpret,
        )


def _attend(
    segment: Segment,
    row_block,
    q_refs,
    pool_refs,
    slot_scale_refs,
    ids_ref,
    scale_ref,  # [1], or [2] with the scale of an e4m3 cache
    out_ref,
    lse_ref,
    part_ref,
    part_lse_ref,
    *,
    tiles: PagedTiles,
    heads: int,
    sparse: bool,
    interpret: bool,
):
    num_pages, page_size, latent = pool_refs[0].shape
    keys, dtype = tiles.keys, q_refs[0].dtype
    power = functools.partial(exp2, interpret=interpret)
    dot = functools.partial(plgpu.dot, precision=precision_for(dtype))
    page_ids = functools.partial(
        _page_ids, ids_ref, num_pages, page_size, segment, keys=keys, sparse=sparse
    )

    # Whole tiles of queries, at the array's end the last one, since a mask on this load slows the
    # kernel down. Rows before or behind the segment's are computed in vain.
    first_row = segment.offset + row_block * tiles.rows
    at = jnp.minimum(segment.base + first_row, q_refs[0].shape[0] - tiles.rows)
    parts = latent_parts(latent, e4m3=pool_refs[0].dtype == FP8)
    columns = [parts, *([(0, ref.shape[1])] for ref in q_refs[1:])]
    operands = [
        (q_ref, pool_ref, part)
        for q_ref, pool_ref, of_pool in zip(q_refs, pool_refs, columns, strict=True)
        for part in of_pool
    ]
    queries = [ref[pl.ds(at, tiles.rows), pl.ds(*part)] for ref, _, part in operands]
    scale = scale_ref[0] * LOG2_E
    cache_scale = scale_ref[1] if scale_ref.shape[0] > 1 else None
    cache_scales = [cache_scale if pool.dtype == FP8 else None for _, pool, _ in operands]
    lane = jnp.arange(tiles.rows)
    row = at + lane - segment.base
    in_request = row < segment.rows
    owned = (row >= first_row) & (row < segment.owned)
    visible = jnp.minimum(segment.seen + row // heads, segment.length)

    def scales_of(block, page):
        at = page, block, keys, segment.length
        return [scale for ref in slot_scale_refs for scale in _load_scales(ref, *at)]

    def step(block, carry, masked):
        acc, m, l, page, slot_scales = carry
        position = block * keys + jnp.arange(keys)
        present = position < segment.length if masked else None
        if present is not None and sparse:
            present &= (page >= 0) & (page < num_pages)
        at = page, block, keys, present
        pools = [_load_keys(ref, *at, part, dtype) for _, ref, part in operands]
        # A step ahead: this load, then the block's, one after the other would be too late.
        page = page_ids(block=block + 1)

        by_key = [scale[None, :] for scale in slot_scales]
        factors = by_key + cache_scales[len(by_key) :]
        products = [dot(q, k, trans_b=True) for q, k in zip(queries, pools, strict=True)]
        s = sum(map(_scaled, products, factors)) * scale
        if present is not None:
            seen = present[None, :] if sparse else position[None, :] < visible[:, None]
            s = jnp.where(seen, s, NEG_INF)
        new_m = jnp.maximum(m, jnp.max(s, axis=1))
        # A row that has seen no key keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m) if masked else new_m
        p, keep = power(s - shift[:, None]), power(m - shift)
        weights = [_scaled(p, factor).astype(dtype) for factor in by_key or [None] * len(parts)]
        added = [dot(*pair) for pair in zip(weights, pools[: len(parts)], strict=True)]
        acc = [a * keep[:, None] + more for a, more in zip(acc, added, strict=True)]
        return acc, new_m, l * keep + jnp.sum(p, axis=1), page, scales_of(block + 1, page)

    begin, end = segment.begin, segment.end
    page = page_ids(block=begin)
    carry = (
        [jnp.zeros((tiles.rows, size), jnp.float32) for _, size in parts],
        jnp.full((tiles.rows,), NEG_INF, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
        page,
        scales_of(begin, page),
    )
    if tiles.mask_all:
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=True), carry)
    else:
        # Blocks that all rows see whole need no mask.
        whole = jnp.minimum(segment.seen + first_row // heads, segment.length) // keys
        whole = jnp.clip(whole, begin, end)
        carry = lax.fori_loop(begin, whole, functools.partial(step, masked=False), carry)
        carry = lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)
    acc, m, l = carry[:3]
    empty = (l == 0.0) | ~in_request
    l = jnp.where(empty, 1.0, l)
    # A select: a padding row's queries, and so its sum, may be NaN.
    out = [jnp.where(empty[:, None], 0.0, _scaled(a / l[:, None], cache_scale)) for a in acc]
    lse = jnp.where(empty, NEG_INF, m + jnp.log2(l))

    @pl.when(segment.slot < 0)
    def _():
        _store(out_ref, at + lane, parts, out, owned)
        plgpu.store(lse_ref.at[at + lane], lse, mask=owned)

    @pl.when(segment.slot >= 0)
    def _():
        first = (segment.slot * pl.num_programs(0) + row_block) * tiles.rows - first_row
        _store(part_ref, first + row, parts, out, owned)
        plgpu.store(part_lse_ref.at[first + row], lse, mask=owned)


def _store(ref, row, parts, values, owned):
    """The values of the columns `parts` to the rows that are `owned`."""
    for (start, size), value in zip(parts, values, strict=True):
        index = (row[:, None], start + jnp.arange(size)[None, :])
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=owned[:, None])


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
    sparse: bool = False,
    interpret: bool,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[
    Float[Array, "rows latent"],
    Float[Array, " rows"],
    Float[Array, "slot_rows latent"],
    Float[Array, " slot_rows"],
]:
    """(out, base-2 lse) of the segments without a slot, and in float32 those of each slot.

    segments: rows as in `Segment`. Slot i has the row_blocks * tiles.rows rows from that times i
    on, in the order of its unit's. What is no segment's is not written. sparse: pages are of one
    token, all rows of a unit see all of its keys, and from `seen` on an id outside the pool stands
    for no key.
    """
    rows, latent = q_nope.shape
    if rows < tiles.rows:
        padding = ((0, tiles.rows - rows), (0, 0))
        q_nope, q_pe = jnp.pad(q_nope, padding), jnp.pad(q_pe, padding)
    rope = q_pe.shape[1] > 0
    with_rope = (q_pe,) if rope else ()
    pools = (ckv_cache, kpe_cache) if rope else (ckv_cache,)
    numbers, slot_scales = [sm_scale], ()
    if kv_scales is not None and scaling(kv_scales) == "slot":
        slot_scales = (kv_scales,)
    elif kv_scales is not None:
        numbers.append(kv_scales)
    args = (q_nope, *with_rope, *pools, page_ids, jnp.stack(numbers), segments, *slot_scales)
    scratch = max(slots, 1) * row_blocks * tiles.rows
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _kernel, tiles=tiles, heads=heads, rope=rope, sparse=sparse, interpret=interpret
        ),
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
    sparse: bool = False,
    deterministic: bool,
    interpret: bool,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "rows latent"], Float[Array, " rows"]]:
    """(out, base-2 lse) of every row that belongs to a unit; the rest is not written.

    A unit has up to row_blocks * tiles.rows rows; each tile of them is a block of its own. slots:
    as many as the parts of split units, at most. sparse: as in `attend_segments`.
    """
    out, lse, part, part_lse = attend_segments(
        *(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, sm_scale, work.segments),
        slots=slots,
        heads=heads,
        row_blocks=row_blocks,
        tiles=tiles,
        sparse=sparse,
        interpret=interpret,
        kv_scales=kv_scales,
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
