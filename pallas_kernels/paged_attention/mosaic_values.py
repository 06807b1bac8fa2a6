"""The other two consumers of the line: the sum of latents, and the result.

Legend: p probabilities; acc the sums of latents so far, relative to the running maximum, of as many
columns each as fit the instruction that ptxas allows a kernel of 512 threads.
"""

# The stubs of Pallas' decorators and of its accumulators say less than is there.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import ROWS, STAGES, Block
from pallas_kernels.paged_attention.mosaic_inline import over_rows, rescale_if_needed
from pallas_kernels.paged_attention.mosaic_tile import ROW_LAYOUT
from pallas_kernels.paged_attention.units import Segment

COLUMNS = 128


def sum_values(c: Block, w: int):
    """Half w of the output's columns: p @ (half w of the latents), tile after tile."""
    widths = [min(COLUMNS, c.half - at) for at in range(0, c.half, COLUMNS)]

    def rescale(acc, keep):
        return (
            [a * over_rows(keep, a.shape) for a in acc]
            if c.interpret
            else rescale_if_needed(acc, keep)
        )

    def values(place, i):
        return c.k_s.at[place, w, :, pl.ds(i * COLUMNS, widths[i])]

    def add_values(acc, place):
        if c.interpret:
            # The interpreter has no accumulators with a value.
            def product(ref, i):
                plgpu.wgmma(ref, c.p_s.at[place], values(place, i))
                return ref[...]

            return [
                a + pl.run_scoped(functools.partial(product, i=i), plgpu.ACC(a.shape, jnp.float32))
                for i, a in enumerate(acc)
            ]

        def accumulate(refs):
            for i, ref in enumerate(refs):
                plgpu.wgmma(ref, c.p_s.at[place], values(place, i))

        return pl.run_state(accumulate)([plgpu.ACC.init(a) for a in acc])

    def segment_body(segment, n):
        def tile(i, carry):
            acc, n = carry
            place = c.place(n)
            with jax.named_scope("wait for probabilities"):
                plgpu.barrier_wait(c.p_ready.at[place])
            with jax.named_scope("rescale"):
                acc = rescale(acc, plgpu.load(c.row_s.at[place], layout=ROW_LAYOUT))
            with jax.named_scope("values"):
                acc = add_values(acc, place)

            # The last tile's place serves to stage the result.
            @pl.when(i + 1 < segment.end)
            def _():
                c.release(place, w)

            return acc, n + 1

        zeros = [jnp.full((ROWS, width), 0, jnp.float32) for width in widths]
        start = ([plgpu.layout_cast(z, plgpu.Layout.WGMMA) for z in zeros], n)
        acc, n = lax.fori_loop(segment.begin, segment.end, tile, start)
        _finish(c, w, segment, acc, c.place(n - 1))
        return n

    c.segments_of_worker(segment_body, jnp.int32(0))


def _finish(c: Block, w: int, segment: Segment, acc, place):
    """The result, or this part of it, into device memory."""
    plgpu.barrier_wait(c.done.at[place])
    factor = plgpu.load(c.row_s.at[STAGES + place], layout=ROW_LAYOUT)
    acc = [a * over_rows(factor, a.shape) for a in acc]

    @pl.when(segment.slot < 0)
    def _():
        # Every warp has used the tile, and no other warpgroup reads this half of it.
        plgpu.commit_smem()
        for i, a in enumerate(acc):
            stage = c.k_s.at[place, w, :, pl.ds(i * COLUMNS, a.shape[1])]
            stage[...] = a.astype(c.out.dtype)
        plgpu.commit_smem()
        rows, columns = pl.ds(0, c.rows), pl.ds(w * c.half, c.half)
        plgpu.copy_smem_to_gmem(c.k_s.at[place, w, rows], c.out.at[c.rows_of(segment), columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(segment.slot >= 0)
    def _():
        rows = pl.ds(c.block * ROWS, ROWS)
        for i, a in enumerate(acc):
            columns = pl.ds(w * c.half + i * COLUMNS, a.shape[1])
            c.part.at[segment.slot, rows, columns][...] = a

    c.release(place, w)
