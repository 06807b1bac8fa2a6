"""The producer warpgroup of the Mosaic GPU kernel: every copy from device to shared memory."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import KEYS, STAGES, Block


def produce(c: Block):
    """Keeps the ring full: of each segment the queries, then its tiles of keys."""
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

    def load_queries(segment, done):
        @pl.when(done > 0)
        def _():
            with jax.named_scope("wait for the queries' place"):
                plgpu.barrier_wait(c.q_free)

        at, rows = c.rows_of(segment), pl.ds(0, c.rows)
        for half in (0, 1):
            columns = pl.ds(half * c.half, c.half)
            plgpu.copy_gmem_to_smem(c.q_nope.at[at, columns], c.q_s.at[half, rows], c.q_full)
        if c.rope:
            plgpu.copy_gmem_to_smem(c.q_pe.at[at], c.q_rope_s.at[0, rows], c.q_full)

    def load_keys(found, n):
        place = c.place(n)
        boxes = []
        for box, (page, row) in enumerate(found):
            rows = pl.ds(pl.multiple_of(row, KEYS), KEYS) if page_size > KEYS else slice(None)
            boxes.append((page, rows, pl.ds(box * per_box, per_box)))
        for half in (0, 1):

            @pl.when(n >= STAGES)
            def _(half=half):
                with jax.named_scope("wait for a place"):
                    plgpu.barrier_wait(c.free.at[2 * place + half])

            for page, rows, at in boxes:
                plgpu.copy_gmem_to_smem(
                    c.ckv.at[page, rows, pl.ds(half * c.half, c.half)],
                    c.k_s.at[place, half, at],
                    c.full.at[2 * place + half],
                    collective_axes=c.axes,
                )
        if c.rope:
            for page, rows, at in boxes:
                plgpu.copy_gmem_to_smem(
                    c.kpe.at[page, rows, slice(None)],
                    c.p_s.at[place, at],
                    c.full_rope.at[place],
                    collective_axes=c.axes,
                )

    def segment_body(segment, carry):
        n, done = carry
        tiles = c.tiles.step // KEYS
        begin, end = segment.begin * tiles, segment.end * tiles
        found = pages(segment, begin)
        load_queries(segment, done)

        def tile(i, carry):
            n, found = carry
            ahead = pages(segment, i + 1)
            load_keys(found, n)
            return n + 1, ahead

        n, _ = lax.fori_loop(begin, end, tile, (n, found))
        return n, done + 1

    n, done = c.segments_of_worker(segment_body, (jnp.int32(0), jnp.int32(0)))

    @pl.when(done > 0)
    def _():
        plgpu.barrier_wait(c.q_free)

    # Nobody leaves while the other block of the cluster may still arrive at its barriers.
    for place in range(STAGES):

        @pl.when(n > place)
        def _(place=place):
            for half in (0, 1):
                plgpu.barrier_wait(c.free.at[2 * place + half])
