"""The other producer of the Mosaic GPU kernel: keys through registers, for a float8_e4m3fn cache.

The tensor cores take latents in the queries' dtype, and as values only that, so the copy engine
cannot bring them. This warpgroup gathers a tile's rows by their slots, multiplies what has scales
and stores tiles as `produce` would have loaded them. Some pieces of a tile, or of the next one, are
on their way to its registers while it converts those in front.
"""

# Older versions of jax, which `unsupported` refuses, have less of this dialect.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import BOX, KEYS, LOWEST, Block
from pallas_kernels.paged_attention.mosaic_inline import over_rows, row_layout, take, take_rows
from pallas_kernels.paged_attention.mosaic_producer import Ring, drain, load_queries
from pallas_kernels.paged_attention.units import Segment
from pallas_kernels.precision import FP8, GROUP


class _Piece(NamedTuple):
    """Columns of a pool that are gathered together: in one place of the ring, under one scale."""

    pool: str
    first: int
    width: int


def convert(c: Block, ring: Ring, *, ahead: int):
    """Keeps the ring full, as `produce` does, with `ahead` pieces of keys in registers."""
    num_pages, page_size, latent = c.refs["ckv"].shape
    width = GROUP if c.refs["ckv"].dtype == FP8 else BOX
    cuts = sorted({*range(0, latent, width), c.half, latent})
    pieces = [_Piece("ckv", first, end - first) for first, end in itertools.pairwise(cuts)]
    if c.rope:
        pieces.append(_Piece("kpe", 0, c.refs["kpe"].shape[-1]))
    # Fewer than a tile's, so that the next tile's slots are known when its pieces are fetched.
    ahead = min(ahead, len(pieces) - 1)

    def slots(segment: Segment, tile):
        """(the slot of each key of a tile, over all pages and clamped; whether there is one)."""
        last = jnp.maximum(lax.div(segment.length + (page_size - 1), jnp.int32(page_size)) - 1, 0)
        key = tile * KEYS + _iota(c)
        place = segment.first_id + jnp.minimum(lax.div(key, jnp.int32(page_size)), last)
        page = _take(c, c.ids, jnp.clip(place, 0, c.ids.shape[0] - 1))
        present = key < segment.length
        if c.sparse:
            present &= (page >= 0) & (page < num_pages)
        page = jnp.clip(page, 0, num_pages - 1)
        return page * page_size + lax.rem(key, jnp.int32(page_size)), present

    def fetch(piece: _Piece, slot, present):
        """(numbers as they lie in memory, the scale of each row or None); 0 for absent keys."""
        numbers = _take_rows(c, c.refs[piece.pool], slot, present, piece.first, piece.width)
        if "slot_scales" not in c.refs or piece.pool != "ckv":
            return numbers, None
        groups = latent // GROUP
        scale = _take(c, c.slot_scales, slot * groups + piece.first // GROUP)
        return numbers, jnp.where(present, scale, 0.0)

    def store(ref, numbers, scale):
        if numbers.dtype == FP8:
            scale = c.scale[1] if scale is None else over_rows(scale, numbers.shape)
            numbers = numbers.astype(jnp.float16).astype(jnp.float32) * scale
        ref[...] = numbers.astype(ref.dtype)

    def segment_body(segment: Segment, carry):
        n, done = carry
        load_queries(c, segment, done)
        tiles = c.tiles.step // KEYS
        begin, end = segment.begin * tiles, segment.end * tiles

        def tile(i, carry):
            n, own, waiting = carry
            slot = own, slots(segment, i + 1)
            queue, left = list(waiting), iter(range(len(pieces)))

            def put(pool, columns, to, full):
                del columns  # the pieces come in the order of the ring's
                first = 0
                if c.sparse and pool is c.kpe:  # the last of a tile's places
                    bias = jnp.where(own[1], 0.0, LOWEST)
                    c.bias_s.at[lax.rem(n, jnp.int32(c.bias_s.shape[0]))][...] = bias
                while first < to.shape[-1]:
                    piece = next(left)
                    width = pieces[piece].width
                    store(to.at[:, pl.ds(first, width)], *queue.pop(0))
                    tiles_ahead, coming = divmod(piece + ahead, len(pieces))
                    queue.append(fetch(pieces[coming], *slot[tiles_ahead]))
                    first += width
                plgpu.commit_smem()
                plgpu.barrier_arrive(full)

            ring.load(c, n, put)
            return n + 1, slot[1], tuple(queue)

        first = slots(segment, begin)
        waiting = tuple(fetch(piece, *first) for piece in pieces[:ahead])
        n, *_ = lax.fori_loop(begin, end, tile, (n, first, waiting))
        return n, done + 1

    n, done = c.segments_of_worker(segment_body, (jnp.int32(0), jnp.int32(0)))
    drain(c, ring, n, done)


def _iota(c: Block):
    if c.interpret:
        return lax.iota(jnp.int32, KEYS)
    return plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=row_layout())


def _take(c: Block, ref, index) -> Any:
    return ref[...][index] if c.interpret else take(ref, index)


def _take_rows(c: Block, ref, slot, present, first: int, columns: int) -> Any:
    if c.interpret:
        rows = ref[...].reshape(-1, ref.shape[-1])[slot, first : first + columns]
        return jnp.where(present[:, None], rows, jnp.zeros_like(rows))
    return take_rows(ref, slot, present, first, columns)
