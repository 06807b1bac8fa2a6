"""The producer warpgroup of the Mosaic GPU kernel: copies from device to shared memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_block import KEYS, STAGES, STRIPE, Block


def _load_halves(c: Block, n, copy):
    """Tile n, each half of its latent columns as soon as the consumer of that half is done."""
    place = c.place(n)
    for half in (0, 1):
        _wait_for(c.free.at[2 * place + half], n >= STAGES)
        columns = pl.ds(half * c.half, c.half)
        copy(c.ckv, columns, c.k_s.at[place, half], c.full.at[2 * place + half])
    if c.rope:
        copy(c.kpe, slice(None), c.p_s.at[place], c.full_rope.at[place])


def _load_stripes(c: Block, n, copy):
    """Tile n, each stripe of its latent columns as soon as there is a place."""
    for stripe in range(c.stripes):
        place = c.stripe_place(n, stripe)
        _wait_for(c.free.at[place], c.stripe_place_used(n, stripe))
        columns = pl.ds(stripe * STRIPE, STRIPE)
        copy(c.ckv, columns, c.k_s.at[place], c.full.at[place])
    if c.rope or c.groups:
        place = c.rope_place(n)
        _wait_for(c.free_rope.at[place], n >= c.full_rope.shape[0])
    if c.rope:
        copy(c.kpe, slice(None), c.rope_s.at[place], c.full_rope.at[place])
    if c.groups:
        copy(c.key_scales, None, c.scales_s.at[place], c.full_rope.at[place])


def _places_of_halves(c: Block, n):
    return [(c.free.at[i], n > i // 2) for i in range(2 * STAGES)]


def _places_of_stripes(c: Block, n):
    found = []
    for i in range(c.k_s.shape[0]):
        ring, place = divmod(i, c.ring_places)
        found.append((c.free.at[i], n > c.rings * (place // c.stripes) + ring))
    if c.rope or c.groups:
        found += [(c.free_rope.at[i], n > i) for i in range(c.full_rope.shape[0])]
    return found


def _wait_for(barrier, used):
    @pl.when(used)
    def _():
        with jax.named_scope("wait for a place"):
            plgpu.barrier_wait(barrier)


class Ring(NamedTuple):
    """How shared memory holds tiles.

    load(c, n, copy) loads tile n, with a function that copies columns of its pages; places(c, n)
    lists each place's barrier, and whether one of the first n tiles was there.
    """

    load: Callable[[Block, Any, Callable], None]
    places: Callable[[Block, Any], list[tuple[Any, Any]]]


HALVES = Ring(_load_halves, _places_of_halves)
STRIPES = Ring(_load_stripes, _places_of_stripes)


def produce(c: Block, ring: Ring):
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

    def load_keys(found, n):
        boxes = []
        for box, (page, row) in enumerate(found):
            rows = pl.ds(pl.multiple_of(row, KEYS), KEYS) if page_size > KEYS else slice(None)
            boxes.append((page, rows, pl.ds(box * per_box, per_box)))

        def copy(pool, columns, to, full):
            for page, rows, at in boxes:
                if columns is None:  # scales, which lie key by key in one dimension
                    of, at = pool.at[page, _spread(rows, c.groups)], _spread(at, c.groups)
                else:
                    of = pool.at[page, rows, columns]
                plgpu.copy_gmem_to_smem(of, to.at[at], full, collective_axes=c.axes)

        ring.load(c, n, copy)

    def segment_body(segment, carry):
        n, done = carry
        tiles = c.tiles.step // KEYS
        begin, end = segment.begin * tiles, segment.end * tiles
        found = pages(segment, begin)
        load_queries(c, segment, done)

        def tile(i, carry):
            n, found = carry
            ahead = pages(segment, i + 1)
            load_keys(found, n)
            return n + 1, ahead

        n, _ = lax.fori_loop(begin, end, tile, (n, found))
        return n, done + 1

    n, done = c.segments_of_worker(segment_body, (jnp.int32(0), jnp.int32(0)))
    drain(c, ring, n, done)


def _spread(rows, groups: int):
    """Where the scales of these keys lie, each with `groups` of them."""
    if isinstance(rows, slice):
        return rows
    return pl.ds(rows.start * groups, rows.size * groups)


def load_queries(c: Block, segment, done):
    """A segment's queries, once those of the one before, if any is `done`, have been used."""

    @pl.when(done > 0)
    def _():
        with jax.named_scope("wait for the queries' place"):
            plgpu.barrier_wait(c.q_free)

    at, rows = c.rows_of(segment), pl.ds(0, c.rows)
    count = c.q_s.shape[0]
    width = c.q_nope.shape[-1] // count
    for i in range(count):
        columns = pl.ds(i * width, width)
        plgpu.copy_gmem_to_smem(c.q_nope.at[at, columns], c.q_s.at[i, rows], c.q_full)
    if c.rope:
        plgpu.copy_gmem_to_smem(c.q_pe.at[at], c.q_rope_s.at[0, rows], c.q_full)
    if c.packed:
        plgpu.copy_gmem_to_smem(c.q_factor.at[at], c.q_factor_s, c.q_full)


def drain(c: Block, ring: Ring, n, done):
    """Waits until n tiles and the queries of `done` segments have been used.

    Nobody leaves while the other block of a cluster may still arrive at its barriers.
    """
    _wait_for(c.q_free, done > 0)
    for barrier, used in ring.places(c, n):
        _wait_for(barrier, used)
