"""The consumers of twins, turns and rows: few rows, which stand on the products' N.

Legend: s scores, p probabilities, m running maximum, l running sums of exponentials, all in base 2,
keys by rows; acc the sums of latents so far, latent columns by rows, relative to m.
"""

# The stubs of Pallas' decorators and of its accumulators say less than is there.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportAttributeAccessIssue=false

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exponential import LOG2_E
from pallas_kernels.paged_attention.mosaic_block import (
    BOX,
    GROWTH,
    KEYS,
    LOWEST,
    STRIPE,
    Block,
)
from pallas_kernels.paged_attention.mosaic_inline import (
    over_columns,
    over_keys,
    over_own_keys,
    over_rows,
    rescale_if_needed,
    store_pieces,
    synchronize,
)
from pallas_kernels.paged_attention.mosaic_packed import (
    PACKED_GROWTH,
    PACKED_LIFT,
    add_product,
    logarithm,
    packed_scores,
)
from pallas_kernels.paged_attention.mosaic_tile import (
    always_zero,
    clear,
    close,
    hide,
    limits,
)
from pallas_kernels.paged_attention.mosaic_unpack import (
    clear_keys,
    store_columns,
    unpack_columns,
)
from pallas_kernels.paged_attention.units import Segment

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(0)


class _Piece(NamedTuple):
    """Columns of a stripe that are this consumer's to sum."""

    stripe: int
    first: int
    width: int


def _pieces(c: Block, w: int) -> list[_Piece]:
    """Half w of the latent columns, by stripes."""
    found, at, end = [], w * c.half, (w + 1) * c.half
    while at < end:
        stripe, first = divmod(at, STRIPE)
        width = min(STRIPE - first, end - at)
        if c.packed:
            width = BOX  # registers for more would be too many
        found.append(_Piece(stripe, first, width))
        at += width
    return found


def consume_alone(c: Block, w: int):
    """A twin: half w of the output's columns, from scores of its own. Or every other tile's part of
    all columns, put together at a segment's end. Or half w of the rows. Nothing waits for the other
    one before."""
    dtype = c.refs["q_nope"].dtype
    growth, lift = (PACKED_GROWTH, PACKED_LIFT) if c.packed else (GROWTH, 0)
    halves = [_pieces(c, half) for half in (0, 1)]
    whole = c.tiles.takes_turns or c.tiles.shares_rows
    pieces = [*halves[0], *halves[1]] if whole else halves[w]
    rows = pl.ds(w * c.own_rows if c.tiles.shares_rows else 0, c.own_rows)
    scale = c.scale[0] * LOG2_E  # where the queries have no factors
    others = sorted(set(range(c.stripes)) - {piece.stripe for piece in pieces})

    def scores(n, z):
        def products(acc):
            for stripe in range(c.stripes):
                place = c.stripe_place(n, stripe)
                with jax.named_scope("wait for keys"):
                    plgpu.barrier_wait(c.full.at[place])
                plgpu.wgmma(acc, c.k_s.at[place], c.q_s.at[stripe + z].transpose((1, 0)))
            if c.rope:
                place = c.rope_place(n)
                with jax.named_scope("wait for keys"):
                    plgpu.barrier_wait(c.full_rope.at[place])
                plgpu.wgmma(acc, c.rope_s.at[place], c.q_rope_s.at[z].transpose((1, 0)))
            with jax.named_scope("scores"):
                return acc[...]

        return pl.run_scoped(products, plgpu.ACC((KEYS, c.rows), jnp.float32)) * scale

    def give_back(n, stripes):
        if c.packed and c.interpret:
            # On the chip, products have waited for what was read into registers. The interpreter
            # knows no such thing, and wants a fence before the next copy.
            plgpu.commit_smem()
        for stripe in stripes:
            plgpu.barrier_arrive(c.free.at[c.stripe_place(n, stripe)])

    def product(ref, piece, place):
        """Adds the products of a piece's latents, transposed, and the probabilities."""
        latents = c.k_s.at[place, :, pl.ds(piece.first, piece.width)]
        plgpu.wgmma(ref, latents.transpose((1, 0)), c.p_s.at[w, 0].transpose((1, 0)))

    def add_packed(sums, places):
        for i, (piece, place) in enumerate(zip(pieces, places, strict=True)):
            latents = unpack_columns(c, c.k_s.at[place], piece.first)
            add_product(c, sums, i, latents, c.p_s.at[w, piece.stripe if c.groups else 0])

    def add_values(acc, n):
        places = [c.stripe_place(n, piece.stripe) for piece in pieces]
        if c.interpret and c.packed:
            add_packed(acc := [*acc], places)
            return acc
        if c.interpret:
            # The interpreter has no accumulators with a value.
            def alone(ref, piece, place):
                product(ref, piece, place)
                return ref[...]

            found = []
            for a, piece, place in zip(acc, pieces, places, strict=True):
                one = functools.partial(alone, piece=piece, place=place)
                found.append(a + pl.run_scoped(one, plgpu.ACC(a.shape, jnp.float32)))
            return found

        def accumulate(refs):
            if c.packed:
                add_packed(refs, places)
                return
            for ref, piece, place in zip(refs, pieces, places, strict=True):
                product(ref, piece, place)

        return pl.run_state(accumulate)([plgpu.ACC.init(a) for a in acc])

    def rescale(acc, keep):
        if c.interpret:
            return [a * over_columns(keep, a.shape) for a in acc]
        return rescale_if_needed(acc, keep, axis=1)

    def segment_body(segment, first):
        limit = limits(c, segment, rows, ROW_LAYOUT)
        skipped = lax.rem(first + w, jnp.int32(2))  # before the first of this one's turns
        plgpu.barrier_wait(c.q_full)

        def tile(turn, carry):
            acc, m, l = carry
            ahead = 2 * turn + skipped if c.tiles.takes_turns else turn
            i, n = segment.begin + ahead, first + ahead
            place, weights = c.rope_place(n) if c.rope or c.groups else None, []
            if c.packed:
                keys = i * KEYS, segment.length
                s, weights = packed_scores(c, n, always_zero(i), rows, *keys)
                factor = plgpu.load(c.q_factor_s.at[rows], layout=ROW_LAYOUT)
                s *= over_columns(factor * LOG2_E, s.shape)
            else:
                s = scores(n, always_zero(i))
            s = hide(c, s, i, segment, limit, place, key_axis=0)
            if c.rope or c.groups:
                plgpu.barrier_arrive(c.free_rope.at[place])
            _clear_unused(c, i, segment, n, halves[w] if c.tiles.shares_rows else pieces)
            give_back(n, others)
            with jax.named_scope("softmax"):
                weighted = s + logarithm(weights, s.shape) if weights else s
                top = _over_keys(c, "max", _over_own_keys(c, "max", weighted), w)
                new_m = jnp.where(top > m + growth, top - lift if lift else top, m)
                p = jnp.exp2(s - over_columns(new_m, s.shape))
            keep = jnp.exp2(m - new_m)
            # Every warp has used the last tile's probabilities: all have met for the maximum.
            for group in _groups_of(c, pieces):
                own = p * over_rows(weights[group], p.shape) if weights else p
                own = plgpu.layout_cast(own.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                c.p_s.at[w, group].transpose((1, 0))[...] = own
            plgpu.commit_smem()
            l = l * keep + _over_own_keys(c, "sum", p)
            with jax.named_scope("values"):
                acc = add_values(rescale(acc, keep), n)
            give_back(n, sorted({piece.stripe for piece in pieces}))
            return acc, new_m, l

        start = (
            [_full((piece.width, rows.size), 0) for piece in pieces],
            plgpu.layout_cast(jnp.full((rows.size,), LOWEST, jnp.float32), ROW_LAYOUT),
            plgpu.layout_cast(jnp.zeros((rows.size,), jnp.float32), ROW_LAYOUT),
        )
        tiles = segment.end - segment.begin
        turns = lax.div(tiles + 1 - skipped, jnp.int32(2)) if c.tiles.takes_turns else tiles
        acc, m, l = lax.fori_loop(0, turns, tile, start)
        plgpu.barrier_arrive(c.q_free)
        l = _over_keys(c, "sum", l, w)
        if c.tiles.takes_turns:
            acc, m, l = _exchange(c, w, halves, acc, m, l)
        own = pieces if c.tiles.shares_rows else halves[w]
        _finish(c, w, segment, rows, own, acc, m, l)
        return first + tiles

    c.segments_of_worker(segment_body, jnp.int32(0))


def _groups_of(c: Block, pieces: list[_Piece]) -> list[int]:
    """The groups of columns whose probabilities this consumer needs: one, if all have the same."""
    return sorted({piece.stripe for piece in pieces}) if c.groups else [0]


def _full(shape, value):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def _over_own_keys(c: Block, op: str, x):
    if c.interpret:
        return {"max": jnp.max, "sum": jnp.sum}[op](x, axis=0)
    return over_own_keys(op, x)


def _over_keys(c: Block, op: str, x, w: int):
    return x if c.interpret else over_keys(op, x, c.top_s.at[w])


def _clear_unused(c: Block, tile, segment: Segment, n, pieces: list[_Piece]):
    """Slots behind the request's last token may hold NaN, which 0 does not silence."""
    if c.tiles.ahead:
        return  # what comes through registers is 0 there
    valid = segment.length - tile * KEYS

    @pl.when(valid < KEYS)
    def _():
        if not c.tiles.takes_turns:
            _meet(c)  # the other one scores these columns, too
        if c.packed:
            for piece in pieces:
                place = c.stripe_place(n, piece.stripe)
                clear_keys(c, c.k_s.at[place], piece.first, piece.width, valid)
            plgpu.commit_smem()
            if c.tiles.shares_rows:
                _meet(c)  # the other one sums these columns, too
            return
        boxes = [
            c.k_s.at[c.stripe_place(n, piece.stripe), :, pl.ds(piece.first + box, BOX)]
            for piece in pieces
            for box in range(0, piece.width, BOX)
        ]
        clear(boxes, valid)


def _meet(c: Block):
    """Waits for the other consumer."""
    plgpu.barrier_arrive(c.met)
    plgpu.barrier_wait(c.met)


def _exchange(c: Block, w: int, halves: list[list[_Piece]], acc, m, l):
    """(acc of half w, m, l) of both consumers' tiles; the other half goes to the other one."""
    count = len(halves[0])
    parts = [acc[:count], acc[count:]]
    rows = [[pl.ds(_column(piece) % c.half, piece.width) for piece in pieces] for pieces in halves]

    c.sums_s.at[w, 0][...] = m
    c.sums_s.at[w, 1][...] = l
    for place, a in zip(rows[1 - w], parts[1 - w], strict=True):
        c.stage_s.at[w, place][...] = a
    plgpu.commit_smem()
    _meet(c)
    others_m, others_l = (plgpu.load(c.sums_s.at[1 - w, i], layout=ROW_LAYOUT) for i in (0, 1))
    others = [
        plgpu.load(c.stage_s.at[1 - w, place], layout=plgpu.Layout.WGMMA) for place in rows[w]
    ]
    _meet(c)  # both have read, and may write the next segment's
    top = jnp.maximum(m, others_m)
    own, other = jnp.exp2(m - top), jnp.exp2(others_m - top)
    acc = [
        a * over_columns(own, a.shape) + b * over_columns(other, b.shape)
        for a, b in zip(parts[w], others, strict=True)
    ]
    return acc, top, l * own + others_l * other


def _column(piece: _Piece) -> int:
    return piece.stripe * STRIPE + piece.first


def _finish(c: Block, w: int, segment: Segment, own, pieces: list[_Piece], acc, m, l):
    """The result, or this part of it, into device memory."""
    factor, lse = close(m, l)
    if c.packed:
        factor *= c.scale[1]
    acc = [a * over_columns(factor, a.shape) for a in acc]

    def put(ref, value):
        if c.interpret:
            ref[...] = value
        else:
            store_pieces(ref, value)

    def store(ref, rows, dtype):
        for a, piece in zip(acc, pieces, strict=True):
            columns = pl.ds(_column(piece), piece.width)
            if c.packed:
                store_columns(c, ref.at[rows, columns], a)
                continue
            a_t = plgpu.layout_cast(a.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            put(ref.at[rows, columns].transpose((1, 0)), a_t)

    @pl.when(segment.slot < 0)
    def _():
        rows = c.rows_of(segment, own)
        store(c.out, rows, c.out.dtype)
        if w == 0 or c.tiles.shares_rows:
            put(c.lse.at[rows], lse)

    @pl.when(segment.slot >= 0)
    def _():
        store(c.part.at[segment.slot], own, jnp.float32)
        if w == 0 or c.tiles.shares_rows:
            put(c.part_lse.at[segment.slot, own], lse)

    # The next maximum is taken where these sums were.
    plgpu.commit_smem() if c.interpret else synchronize()
