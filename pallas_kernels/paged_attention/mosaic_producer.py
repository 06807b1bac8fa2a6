"""The producer warpgroup of the Mosaic GPU kernel: every copy from device to shared memory."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import KEYS, Block


def produce(c: Block):
    """Keeps both tiles full, a half at a time, in the order in which the halves fall free."""
    num_pages, page_size, _ = c.refs["ckv"].shape
    boxes = max(1, KEYS // page_size)
    per_box = KEYS // boxes

    def pages(segment, tile):
        """(page, first row in it) of every box of a tile; clamped, whatever the ids are."""
        last = jnp.maximum(lax.div(segment.length + (page_size - 1), jnp.int32(page_size)) - 1, 0)
        found = []
        for box in range(boxes):
            token = tile * KEYS + box * per_box
            slot = segment.first_id + jnp.minimum(lax.div(token, jnp.int32(page_size)), last)
            page = c.ids[jnp.clip(slot, 0, c.ids.shape[0] - 1)]
            row = lax.rem(token, jnp.int32(page_size))
            found.append((jnp.clip(page, 0, num_pages - 1), row))
        return found

    def source(ref, page, row, columns):
        rows = pl.ds(pl.multiple_of(row, KEYS), KEYS) if page_size > KEYS else slice(None)
        return ref.at[page, rows, columns]

    def load_half(found, w, half):
        for box, (page, row) in enumerate(found):
            plgpu.copy_gmem_to_smem(
                source(c.ckv, page, row, pl.ds(half * c.half, c.half)),
                c.k_s.at[w, half, pl.ds(box * per_box, per_box)],
                c.full.at[2 * w + half],
                collective_axes=c.axes,
            )

    def load_rope(found, w):
        for box, (page, row) in enumerate(found):
            plgpu.copy_gmem_to_smem(
                source(c.kpe, page, row, slice(None)),
                c.rope_s.at[w, pl.ds(box * per_box, per_box)],
                c.full_rope.at[w],
                collective_axes=c.axes,
            )

    def load_queries(segment, done):
        @pl.when(done > 0)
        def _():
            plgpu.barrier_wait(c.q_free)

        at, place = c.rows_of(segment), pl.ds(0, c.rows)
        for half in (0, 1):
            columns = pl.ds(half * c.half, c.half)
            plgpu.copy_gmem_to_smem(c.q_nope.at[at, columns], c.q_s.at[half, place], c.q_full)
        if c.rope:
            # Each consumer takes them into registers, then puts its probabilities in their place.
            taken = c.q_rope_s if c.interpret else c.p_s
            for w in (0, 1):
                plgpu.copy_gmem_to_smem(c.q_pe.at[at], taken.at[w, place], c.q_full)

    def segment_body(segment, carry):
        filled, done = carry

        def both(i):
            return [pages(segment, 2 * i + w) for w in (0, 1)]

        def pair(i, carry):
            filled, found = carry
            ahead = both(i + 1)
            for w in (0, 1):
                # Consumer 1 uses the right half of tile 1 first, and consumer 0 its left one.
                for half in (w, 1 - w):

                    @pl.when(filled > 0)
                    def _(w=w, half=half):
                        plgpu.barrier_wait(c.free.at[2 * w + half])

                    load_half(found[w], w, half)
                    if c.rope and half == w:
                        load_rope(found[w], w)

            @pl.when(i == segment.begin)
            def _():
                load_queries(segment, done)

            return filled + 1, ahead

        @pl.when(segment.begin == segment.end)
        def _():
            load_queries(segment, done)

        carry = (filled, both(segment.begin))
        filled, _ = lax.fori_loop(segment.begin, segment.end, pair, carry)
        return filled, done + 1

    filled, done = c.segments_of_worker(segment_body, (jnp.int32(0), jnp.int32(0)))

    @pl.when(done > 0)
    def _():
        plgpu.barrier_wait(c.q_free)

    # Nobody leaves while the other block of the cluster may still arrive at its barriers.
    @pl.when(filled > 0)
    def _():
        for barrier in range(4):
            plgpu.barrier_wait(c.free.at[barrier])
