"""The other producer of the Mosaic GPU kernel: keys through registers, by slots or of e4m3.

The copy engine cannot bring tokens one by one, and in shared memory the tensor cores take values in
the queries' dtype only. These warpgroups gather a tile's rows by their slots, multiply what has
scales and store tiles as `produce` would have loaded them. Some pieces of a tile, or of the next
one, are on their way to registers while those in front are converted. Nothing may use what is on
its way: a choice between it and 0, made where it is loaded, would wait for the memory in every
tile.
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
from pallas_kernels.paged_attention.mosaic_inline import (
    keep_rows,
    over_rows,
    row_layout,
    take,
    take_rows,
)
from pallas_kernels.paged_attention.mosaic_producer import Ring, drain, load_queries
from pallas_kernels.paged_attention.units import Segment
from pallas_kernels.precision import FP8, GROUP

CONVERTERS = 2
"""Warpgroups that share a tile's rows: one alone waits for its own instructions."""


class _Piece(NamedTuple):
    """Columns of a pool that are gathered together: in one place of the ring, under one scale."""

    pool: str
    first: int
    width: int


class _Slots(NamedTuple):
    """Of each key of a tile: its slot over all pages, whether there is one, its groups' scales."""

    slot: Any
    present: Any
    scales: list[Any]


def convert(c: Block, ring: Ring, *, ahead: int, part: int):
    """Keeps the ring full, as `produce` does, of this part of each tile's rows.

    ahead: pieces in registers.
    """
    rows = KEYS // CONVERTERS
    own_rows = pl.ds(part * rows, rows)
    num_pages, page_size, latent = c.refs["ckv"].shape
    width = GROUP if c.refs["ckv"].dtype == FP8 else BOX
    cuts = sorted({*range(0, latent, width), c.half, latent})
    pieces = [_Piece("ckv", first, end - first) for first, end in itertools.pairwise(cuts)]
    if c.rope:
        pieces.append(_Piece("kpe", 0, c.refs["kpe"].shape[-1]))
    groups = latent // GROUP if "slot_scales" in c.refs else 0
    # At most a tile's, since of the tiles behind only the next one's slots are known.
    ahead = min(ahead, len(pieces))

    def key_of(tile):
        return tile * KEYS + part * rows + _iota(c, rows)

    def pages(segment: Segment, tile):
        """The pages, as they are listed, of a tile's keys; any that are there behind the last."""
        last = jnp.maximum(lax.div(segment.length + (page_size - 1), jnp.int32(page_size)) - 1, 0)
        place = segment.first_id + jnp.minimum(lax.div(key_of(tile), jnp.int32(page_size)), last)
        (page,) = _take(c, c.ids, jnp.clip(place, 0, c.ids.shape[0] - 1))
        return page

    def slots(segment: Segment, tile, page) -> _Slots:
        key = key_of(tile)
        present = key < segment.length
        if c.sparse:
            present &= (page >= 0) & (page < num_pages)
        page = jnp.clip(page, 0, num_pages - 1)
        slot = page * page_size + lax.rem(key, jnp.int32(page_size))
        return _Slots(slot, present, _take(c, c.slot_scales, slot, groups) if groups else [])

    def fetch(piece: _Piece, tile: _Slots):
        """(numbers as they lie in memory; the scale of each row, or None)."""
        numbers = _take_rows(c, c.refs[piece.pool], tile.slot, piece.first, piece.width)
        scaled = groups and piece.pool == "ckv"
        return numbers, tile.scales[piece.first // GROUP] if scaled else None

    def store(ref, numbers, scale, present):
        """Absent keys are stored as 0: their numbers and scales may be NaN."""
        numbers = _keep_rows(c, numbers, present)
        if numbers.dtype == FP8:
            scale = c.scale[1] if scale is None else jnp.where(present, scale, 0.0)
            scale = over_rows(scale, numbers.shape) if scale.ndim else scale
            numbers = numbers.astype(jnp.float16).astype(jnp.float32) * scale
        ref[...] = numbers.astype(ref.dtype)

    def segment_body(segment: Segment, carry):
        n, done = carry
        if part == 0:
            load_queries(c, segment, done)
        tiles = c.tiles.step // KEYS
        begin, end = segment.begin * tiles, segment.end * tiles

        def tile(i, carry):
            n, own, page, waiting = carry
            # What a load gives is used a tile later: the pages, then slots and their scales.
            known = own, slots(segment, i + 1, page)
            page = pages(segment, i + 2)
            queue, left = list(waiting), iter(range(len(pieces)))

            def put(pool, columns, to, full):
                del columns  # the pieces come in the order of the ring's
                first = 0
                if c.sparse and pool is c.kpe:  # the last of a tile's places
                    bias = jnp.where(own.present, 0.0, LOWEST)
                    c.bias_s.at[lax.rem(n, jnp.int32(c.bias_s.shape[0])), own_rows][...] = bias
                while first < to.shape[-1]:
                    piece = next(left)
                    width = pieces[piece].width
                    store(to.at[own_rows, pl.ds(first, width)], *queue.pop(0), own.present)
                    tiles_ahead, coming = divmod(piece + ahead, len(pieces))
                    queue.append(fetch(pieces[coming], known[tiles_ahead]))
                    first += width
                plgpu.commit_smem()
                plgpu.barrier_arrive(full)

            ring.load(c, n, put)
            return n + 1, known[1], page, tuple(queue)

        first, page = slots(segment, begin, pages(segment, begin)), pages(segment, begin + 1)
        waiting = tuple(fetch(piece, first) for piece in pieces[:ahead])
        n, *_ = lax.fori_loop(begin, end, tile, (n, first, page, waiting))
        return n, done + 1

    n, done = c.segments_of_worker(segment_body, (jnp.int32(0), jnp.int32(0)))
    drain(c, ring, n, done if part == 0 else jnp.int32(0))


def _iota(c: Block, rows: int):
    if c.interpret:
        return lax.iota(jnp.int32, rows)
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=row_layout())


def _take(c: Block, ref, index, count: int = 1) -> Any:
    if c.interpret:
        return [ref[...][count * index + i] for i in range(count)]
    return take(ref, index, count)


def _take_rows(c: Block, ref, slot, first: int, columns: int) -> Any:
    if c.interpret:
        return ref[...].reshape(-1, ref.shape[-1])[slot, first : first + columns]
    return take_rows(ref, slot, first, columns)


def _keep_rows(c: Block, numbers, present) -> Any:
    if c.interpret:
        return jnp.where(present[:, None], numbers, jnp.zeros_like(numbers))
    return keep_rows(numbers, present)
