"""The first consumer of the line: scores and softmax of every tile."""

# The stubs of Pallas' accumulators say less than is there.
# pyright: reportPrivateImportUsage=false

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exponential import LOG2_E
from pallas_kernels.paged_attention.mosaic_block import KEYS, ROWS, STAGES, Block
from pallas_kernels.paged_attention.mosaic_tile import (
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


def score(c: Block):
    """Publishes the probabilities of tile after tile, and the factors of the sums before them."""
    dtype = c.refs["q_nope"].dtype
    scale = c.scale[0] * LOG2_E

    def scores(place, z):
        def products(acc):
            add_scores(c, acc, place, z)
            with jax.named_scope("scores"):
                return acc[...]

        return pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32)) * scale

    def segment_body(segment, n):
        limit = limits(c, segment)
        plgpu.barrier_wait(c.q_full)

        def tile(i, carry):
            m, l, n = carry
            place = c.place(n)
            s = hide(c, scores(place, always_zero(i)), i, segment, limit, place)
            clear_unused(c, i, segment, place)
            with jax.named_scope("softmax"):
                p, new_m = softmax(m, s)
            keep = jnp.exp2(m - new_m)
            with jax.named_scope("publish"):
                publish(c, p.astype(dtype), keep, place)
            return new_m, l * keep + sum_rows(p), n + 1

        m, l, n = lax.fori_loop(segment.begin, segment.end, tile, (*no_sums(), n))
        plgpu.barrier_arrive(c.q_free)
        _finish(c, segment, m, l, c.place(n - 1))
        return n

    c.segments_of_worker(segment_body, jnp.int32(0))


def _finish(c: Block, segment: Segment, m, l, place):
    """The factor of the sums for the consumers of values, and the log-sum-exp."""
    factor, lse = close(m, l)
    c.row_s.at[STAGES + place][...] = factor
    if c.interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(c.done.at[place])

    @pl.when(segment.slot < 0)
    def _():
        c.row_s.at[2 * STAGES][...] = lse
        plgpu.commit_smem()
        rows = pl.ds(0, c.rows)
        plgpu.copy_smem_to_gmem(c.row_s.at[2 * STAGES, rows], c.lse.at[c.rows_of(segment)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(segment.slot >= 0)
    def _():
        c.part_lse.at[segment.slot, pl.ds(c.block * ROWS, ROWS)][...] = lse
