"""The consumers of the seesaw: scores, softmax, values, and the result."""

# The stubs of Pallas' decorators and of its accumulators say less than is there.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exponential import LOG2_E
from pallas_kernels.paged_attention.mosaic_block import KEYS, ROWS, STAGES, Block
from pallas_kernels.paged_attention.mosaic_inline import over_rows, rescale_if_needed
from pallas_kernels.paged_attention.mosaic_tile import (
    ROW_LAYOUT,
    add_scores,
    always_zero,
    clear_unused,
    close,
    hide,
    limits,
    no_sums,
    publish,
    softmax,
    sum_rows,
)
from pallas_kernels.paged_attention.units import Segment


def consume(c: Block, w: int):
    """Consumer w: the scores of tile w of every pair, and half w of the output's columns."""
    other = 1 - w
    dtype = c.refs["q_nope"].dtype
    scale = c.scale[0] * LOG2_E

    columns = _columns(c)

    def scores(z):
        def products(acc):
            add_scores(c, acc, w + z, z)
            return acc[...]

        return pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32)) * scale

    def add_values(acc, p, tile, z):
        """acc + p @ (half w of a tile's latents); p None: what the other consumer has published."""
        if c.interpret:
            # The interpreter has neither accumulators with a value nor products of registers.
            def product(ref, at):
                plgpu.wgmma(ref, c.p_s.at[tile], c.k_s.at[tile, w, :, at])
                return ref[...]

            return [
                a + pl.run_scoped(functools.partial(product, at=at), plgpu.ACC(a.shape, a.dtype))
                for a, at in zip(acc, columns, strict=True)
            ]

        def accumulate(refs):
            add_products(refs, c.p_s.at[tile + z] if p is None else p, tile + z)

        return pl.run_state(accumulate)([plgpu.ACC.init(a) for a in acc])

    def add_products(refs, p, tile):
        for ref, at in zip(refs, columns, strict=True):
            plgpu.wgmma(ref, p, c.k_s.at[tile, w, :, at])

    def rescale(acc, keep):
        if c.interpret:
            return [a * over_rows(keep, a.shape) for a in acc]
        return rescale_if_needed(acc, keep)

    def take(tile):
        """The other consumer's maximum, once its probabilities are there."""
        with jax.named_scope("wait for probabilities"):
            plgpu.barrier_wait(c.p_ready.at[tile])
        return plgpu.load(c.row_s.at[tile], layout=ROW_LAYOUT)

    def own_tile(acc, m, l, s, z):
        """Softmax of the own tile's scores, which the other is told of, and its values."""
        p, new_m = softmax(m, s)
        p16 = p.astype(dtype)
        publish(c, p16, new_m, w)
        keep = jnp.exp2(m - new_m)
        l = l * keep + sum_rows(p)
        acc = add_values(rescale(acc, keep), p16, w, z)
        c.release(w, w)
        return acc, new_m, l

    def others_tile(acc, m, l, z):
        new_m = take(other)
        keep = jnp.exp2(m - new_m)
        acc = add_values(rescale(acc, keep), None, other, z)
        c.release(other, w)
        return acc, new_m, l * keep

    def both_tiles(acc, m, l, i, z, segment, limit):
        """Consumer 1's turn, with its softmax beside the products of the other's tile."""

        def body(refs):
            s_ref, acc_refs, m_ref, l_ref, p_ref, keep_ref = refs
            add_scores(c, s_ref, w + z, z)
            m0 = take(other)
            keep = jnp.exp2(m_ref[...] - m0)
            # Not reads of ref[...], which would wait for the scores.
            sums = [plgpu.wgmma_accumulator_load(ref, wait_n=None) for ref in acc_refs]
            for ref, a in zip(acc_refs, rescale(sums, keep), strict=True):
                ref[...] = a
            add_products(acc_refs, c.p_s.at[other + z], other + z)
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(acc_refs)) * scale
            s = hide(c, s, 2 * i + w, segment, limit, w)
            clear_unused(c, 2 * i + w, segment, w)
            p, m1 = softmax(m0, s)
            p_ref[...] = p.astype(dtype)
            publish(c, p_ref[...], m1, w)
            m_ref[...] = m1
            keep_ref[...] = jnp.exp2(m0 - m1)
            l_ref[...] = l_ref[...] * keep * keep_ref[...] + sum_rows(p)

        zeros = plgpu.layout_cast(jnp.full((ROWS, KEYS), 0, jnp.float32), plgpu.Layout.WGMMA)
        sums = [plgpu.ACC.init(a) for a in acc]
        start = (plgpu.ACC.init(zeros), sums, m, l, zeros.astype(dtype), m)
        _, acc, m, l, p16, keep = pl.run_state(body)(start)
        c.release(other, w)
        acc = add_values(rescale(acc, keep), p16, w, z)
        c.release(w, w)
        return acc, m, l

    def segment_body(segment, carry):
        limit = limits(c, segment)
        plgpu.barrier_wait(c.q_full)

        def pair(i, carry):
            z = always_zero(i)
            if w == 1 and not c.interpret:
                return both_tiles(*carry, i, z, segment, limit)
            s = hide(c, scores(z), 2 * i + w, segment, limit, w)
            clear_unused(c, 2 * i + w, segment, w)
            if w == 0:
                return others_tile(*own_tile(*carry, s, z), z)
            return own_tile(*others_tile(*carry, z), s, z)

        sums = [
            plgpu.layout_cast(jnp.full((ROWS, at.size), 0, jnp.float32), plgpu.Layout.WGMMA)
            for at in columns
        ]
        acc, m, l = lax.fori_loop(segment.begin, segment.end, pair, (sums, *no_sums()))
        _finish(c, w, segment, columns, acc, m, l)
        return carry

    c.segments_of_worker(segment_body, jnp.int32(0))


def _columns(c: Block) -> list[Any]:
    """How a consumer's half of the output's columns is cut into products.

    Beside two converters a thread starts with 128 registers, and ptxas refuses products of 256
    columns.
    """
    width = 128 if c.tiles.ahead else c.half
    return [pl.ds(first, min(width, c.half - first)) for first in range(0, c.half, width)]


def _finish(c: Block, w: int, segment: Segment, columns, acc, m, l):
    """Both consumers' sums together, and this one's half of the columns into device memory."""
    c.row_s.at[STAGES + w][...] = l
    plgpu.barrier_arrive(c.done.at[0])
    plgpu.barrier_wait(c.done.at[0])
    l = l + plgpu.load(c.row_s.at[STAGES + 1 - w], layout=ROW_LAYOUT)
    factor, lse = close(m, l)
    acc = [a * over_rows(factor, a.shape) for a in acc]

    @pl.when(segment.slot < 0)
    def _():
        # The queries have been used by both: their place serves to stage the result.
        at, rows = c.rows_of(segment), pl.ds(0, c.rows)
        for a, one in zip(acc, columns, strict=True):
            c.q_s.at[w, :, one][...] = a.astype(c.out.dtype)
        if w == 0:
            c.row_s.at[2 * STAGES][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c.q_s.at[w, rows], c.out.at[at, pl.ds(w * c.half, c.half)])
        if w == 0:
            plgpu.copy_smem_to_gmem(c.row_s.at[2 * STAGES, rows], c.lse.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(segment.slot >= 0)
    def _():
        rows = pl.ds(c.block * ROWS, ROWS)
        for a, one in zip(acc, columns, strict=True):
            place = pl.ds(w * c.half + one.start, one.size)
            c.part.at[segment.slot, rows, place][...] = a
        if w == 0:
            c.part_lse.at[segment.slot, rows][...] = lse

    plgpu.barrier_arrive(c.q_free)
