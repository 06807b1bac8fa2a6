"""The consumer warpgroups of the Mosaic GPU kernel: scores, softmax, values, and the result.

Legend: s scores, p probabilities, m running maximum, l running sum of exponentials, all in base 2;
acc the sum of latents so far.
"""

# The stubs of Pallas' decorators and of its accumulators say less than is there.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.exponential import LOG2_E, NEG_INF
from pallas_kernels.paged_attention.mosaic_block import (
    BOX,
    GROWTH,
    KEYS,
    LOWEST,
    ROWS,
    Block,
)
from pallas_kernels.paged_attention.mosaic_inline import (
    fence,
    rescale_if_needed,
    synchronize,
)
from pallas_kernels.paged_attention.units import Segment


def over_rows(v: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(v, shape, [0])


def reduce_rows(pairwise, whole, x: Array) -> Array:
    """`whole(x, axis=1)` with short chains of dependent operations."""
    while x.shape[1] > 16:
        half = x.shape[1] // 2
        x = pairwise(x[:, :half], x[:, half:])
    return whole(x, axis=1)


def consume(c: Block, w: int):
    """Consumer w: the scores of tile w of every pair, and half w of the output's columns."""
    other = 1 - w
    dtype = c.refs["q_nope"].dtype
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    scale = c.scale[0] * LOG2_E

    def add_scores(acc, q_rope, z):
        """acc + the scores of the own tile.

        z is always 0, but the compiler cannot know it: with constant indices it hoists some seventy
        64-bit matrix descriptors out of the loop, and the kernel spills.
        """
        for half in (w, other):
            plgpu.barrier_wait(c.full.at[2 * w + half])
            plgpu.wgmma(acc, c.q_s.at[half + z], c.k_s.at[w + z, half + z].transpose((1, 0)))
        if c.rope:
            plgpu.barrier_wait(c.full_rope.at[w])
            left = c.q_rope_s.at[w] if c.interpret else q_rope
            plgpu.wgmma(acc, left, c.rope_s.at[w + z].transpose((1, 0)))

    def scores(q_rope, z):
        def products(acc):
            add_scores(acc, q_rope, z)
            return acc[...]

        return pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32)) * scale

    def hide(s, i, segment, limit):
        """Scores of keys that a row does not see become the lowest."""
        first = (2 * i + w) * KEYS

        def hidden(s):
            key = first + plgpu.broadcasted_iota(
                jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA
            )
            bound = limit if c.tokens == 1 else over_rows(limit, s.shape)
            return jnp.where(key < bound, s, LOWEST)

        return lax.cond(first + KEYS > segment.seen, hidden, lambda s: s, s)

    def clear_unused(i, segment):
        """Slots behind the request's last token may hold NaN, which 0 does not silence."""
        valid = segment.length - (2 * i + w) * KEYS

        @pl.when(valid < KEYS)
        def _():
            key = plgpu.broadcasted_iota(jnp.int32, (KEYS, BOX), 0, layout=plgpu.Layout.WGMMA)
            for half in (0, 1):
                for box in range(c.half // BOX):
                    ref = c.k_s.at[w, half, :, pl.ds(box * BOX, BOX)]
                    values = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                    ref[...] = jnp.where(key < valid, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def add_values(acc, p, tile, z):
        """acc + p @ (half w of a tile's latents); p None: what the other consumer has published."""
        if c.interpret:
            # The interpreter has neither accumulators with a value nor products of registers.
            def product(ref):
                plgpu.wgmma(ref, c.p_s.at[tile], c.k_s.at[tile, w])
                return ref[...]

            return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

        def accumulate(ref):
            plgpu.wgmma(ref, c.p_s.at[tile + z] if p is None else p, c.k_s.at[tile + z, w])

        return pl.run_state(accumulate)(plgpu.ACC.init(acc))

    def softmax(m, s):
        """(p, the maximum that they are relative to)."""
        top = reduce_rows(jnp.maximum, jnp.max, s)
        new_m = jnp.where(top > m + GROWTH, top, m)
        return jnp.exp2(s - over_rows(new_m, s.shape)), new_m

    def rescale(acc, keep):
        return acc * over_rows(keep, acc.shape) if c.interpret else rescale_if_needed(acc, keep)

    def publish(p, m):
        c.p_s.at[w][...] = p
        c.max_s.at[w][...] = m
        plgpu.commit_smem() if c.interpret else fence()
        plgpu.barrier_arrive(c.p_ready.at[w])

    def take(tile):
        """The other consumer's maximum, once its probabilities are there."""
        plgpu.barrier_wait(c.p_ready.at[tile])
        return plgpu.load(c.max_s.at[tile], layout=row_layout)

    def release(tile):
        if c.tiles.cluster > 1:
            # One warp arrives for all four, which must have read the tile.
            plgpu.commit_smem() if c.interpret else synchronize()
        plgpu.barrier_arrive(c.free.at[2 * tile + w])

    def own_tile(acc, m, l, s, z):
        """Softmax of the own tile's scores, which the other is told of, and its values."""
        p, new_m = softmax(m, s)
        p16 = p.astype(dtype)
        publish(p16, new_m)
        keep = jnp.exp2(m - new_m)
        l = l * keep + reduce_rows(jnp.add, jnp.sum, p)
        acc = add_values(rescale(acc, keep), p16, w, z)
        release(w)
        return acc, new_m, l

    def others_tile(acc, m, l, z):
        new_m = take(other)
        keep = jnp.exp2(m - new_m)
        acc = add_values(rescale(acc, keep), None, other, z)
        release(other)
        return acc, new_m, l * keep

    def both_tiles(acc, m, l, q_rope, i, z, segment, limit):
        """Consumer 1's turn, with its softmax beside the products of the other's tile."""

        def body(refs):
            s_ref, acc_ref, m_ref, l_ref, p_ref, keep_ref = refs
            add_scores(s_ref, q_rope, z)
            m0 = take(other)
            keep = jnp.exp2(m_ref[...] - m0)
            # Not a read of acc_ref[...], which would wait for the scores.
            acc_ref[...] = rescale(plgpu.wgmma_accumulator_load(acc_ref, wait_n=None), keep)
            plgpu.wgmma(acc_ref, c.p_s.at[other + z], c.k_s.at[other + z, w])
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1) * scale
            s = hide(s, i, segment, limit)
            clear_unused(i, segment)
            p, m1 = softmax(m0, s)
            p_ref[...] = p.astype(dtype)
            publish(p_ref[...], m1)
            m_ref[...] = m1
            keep_ref[...] = jnp.exp2(m0 - m1)
            l_ref[...] = l_ref[...] * keep * keep_ref[...] + reduce_rows(jnp.add, jnp.sum, p)

        zeros = plgpu.layout_cast(jnp.full((ROWS, KEYS), 0, jnp.float32), plgpu.Layout.WGMMA)
        start = (plgpu.ACC.init(zeros), plgpu.ACC.init(acc), m, l, zeros.astype(dtype), m)
        _, acc, m, l, p16, keep = pl.run_state(body)(start)
        release(other)
        acc = add_values(rescale(acc, keep), p16, w, z)
        release(w)
        return acc, m, l

    def segment_body(segment, carry):
        limit = segment.length
        if c.tokens > 1:
            row = segment.offset + c.block * ROWS
            row += plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
            limit = jnp.minimum(segment.seen + lax.div(row, jnp.int32(c.heads)), segment.length)
        plgpu.barrier_wait(c.q_full)
        q_rope = None
        if c.rope and not c.interpret:
            q_rope = plgpu.load(c.p_s.at[w], layout=plgpu.Layout.WGMMA)
            plgpu.commit_smem()

        def pair(i, carry):
            z = lax.shift_right_logical(i, jnp.int32(30))
            if w == 1 and not c.interpret:
                return both_tiles(*carry, q_rope, i, z, segment, limit)
            s = hide(scores(q_rope, z), i, segment, limit)
            clear_unused(i, segment)
            if w == 0:
                return others_tile(*own_tile(*carry, s, z), z)
            return own_tile(*others_tile(*carry, z), s, z)

        start = (
            plgpu.layout_cast(jnp.full((ROWS, c.half), 0, jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout),
            plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), row_layout),
        )
        acc, m, l = lax.fori_loop(segment.begin, segment.end, pair, start)
        _finish(c, w, segment, acc, m, l)
        return carry

    c.segments_of_worker(segment_body, jnp.int32(0))


def _finish(c: Block, w: int, segment: Segment, acc, m, l):
    """Both consumers' sums together, and this one's half of the columns into device memory."""
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    c.sum_s.at[w][...] = l
    plgpu.barrier_arrive(c.both)
    plgpu.barrier_wait(c.both)
    l = l + plgpu.load(c.sum_s.at[1 - w], layout=row_layout)
    empty = m <= LOWEST / 2
    l = jnp.where(empty, 1.0, l)
    acc = jnp.where(over_rows(empty, acc.shape), 0.0, acc * over_rows(1.0 / l, acc.shape))
    lse = jnp.where(empty, NEG_INF, m + jnp.log2(l))
    columns = pl.ds(w * c.half, c.half)

    @pl.when(segment.slot < 0)
    def _():
        # The queries have been used by both: their place serves to stage the result.
        at, rows = c.rows_of(segment), pl.ds(0, c.rows)
        c.q_s.at[w][...] = acc.astype(c.out.dtype)
        if w == 0:
            c.max_s.at[0][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c.q_s.at[w, rows], c.out.at[at, columns])
        if w == 0:
            plgpu.copy_smem_to_gmem(c.max_s.at[0, rows], c.lse.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(segment.slot >= 0)
    def _():
        rows = pl.ds(c.block * ROWS, ROWS)
        c.part.at[segment.slot, rows, columns][...] = acc
        if w == 0:
            c.part_lse.at[segment.slot, rows][...] = lse

    plgpu.barrier_arrive(c.q_free)
