"""What a block of the one launch does for an instruction: a partial, or a reduction.

Legend: s scores, m running maximum, l running sum of exponentials, all in base 2; acc the sum of
latents so far.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.exponential import LOG2_E, NEG_INF, exp2
from pallas_kernels.megakernel.program import token_groups
from pallas_kernels.megakernel.signals import LATE, publish, wait_for
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.precision import precision_for
from pallas_kernels.schedule.instructions.words import FIRST_DEPENDENCY, QUERY_TOKENS

# Of pallas: what a kernel sees of an array in the device's memory.
Ref = Any


class Static(NamedTuple):
    """What does not change between launches of a compiled kernel."""

    tokens: int
    heads: int
    tiles: PagedTiles
    patience: int
    interpret: bool

    @property
    def slot_rows(self) -> int:
        """Query rows of a row of scratch: those of a group of tokens."""
        return token_groups(self.tokens)[1] * self.heads


class Memory(NamedTuple):
    """The arrays of a launch; out, part, part_lse and signals are written."""

    q: tuple[Ref, Ref]  # [rows, 512] and [rows, 64], token-major and head-minor
    pools: tuple[Ref, Ref]  # [pages, 256, 512] and [pages, 256, 64]
    table: Ref  # [batch, max_pages]
    scale: Ref  # [1]
    words: Ref  # [instructions, 32], queue by queue
    lengths: Ref | None  # [batch], in place of the words'
    out: Ref  # [rows, 512]
    part: Ref  # [scratch rows * slot_rows, 512]
    part_lse: Ref  # [scratch rows * slot_rows]
    signals: Ref


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of the table, whose words are read as they are needed."""

    words: Ref
    index: Any

    def __getitem__(self, word):
        return self.words[self.index, word]


class Result(NamedTuple):
    """Where rows of a result go: to those of `out` from out_row on, or, below 0, to scratch."""

    out_row: Any
    part_row: Any

    def write(self, memory: Memory, row, acc, lse, mask) -> None:
        column = jnp.arange(acc.shape[1])[None, :]

        @pl.when(self.out_row >= 0)
        def _():
            at = memory.out.at[(self.out_row + row)[:, None], column]
            plgpu.store(at, acc.astype(memory.out.dtype), mask=mask[:, None])

        @pl.when(self.out_row < 0)
        def _():
            to = self.part_row + row
            plgpu.store(memory.part.at[to[:, None], column], acc, mask=mask[:, None])
            plgpu.store(memory.part_lse.at[to], lse, mask=mask)


def _result(static: Static, dst_batch, dst_seq, uid, token) -> Result:
    """That of an instruction whose first row is `token`'s, of its group."""
    out_row = (dst_batch * static.tokens + dst_seq) * static.heads
    return Result(
        jnp.where(dst_batch < 0, -1, out_row), uid * static.slot_rows + token * static.heads
    )


def _attend(memory: Memory, static: Static, batch, q_seq, start, end, length, first_row):
    """(row of each lane in the group, acc, lse) of a tile of the group's rows, over start:end.

    Tiles of keys stand at multiples of their size, so that none spans two pages: the first may
    hold keys before the start, which are only masked, the last keys behind the end, which are
    zeros, since unused slots may hold NaN.
    """
    tiles, heads = static.tiles, static.heads
    num_pages, page_size, latent = memory.pools[0].shape
    keys = tiles.keys
    power = functools.partial(exp2, interpret=static.interpret)
    dot = functools.partial(plgpu.dot, precision=precision_for(memory.q[0].dtype))
    scale = memory.scale[0] * LOG2_E

    # A whole tile of queries, at the array's end the last one: a mask would slow this load down.
    # Rows that are not the group's are computed in vain.
    base = (batch * static.tokens + q_seq) * heads
    at = jnp.minimum(base + first_row, memory.q[0].shape[0] - tiles.rows)
    queries = [ref[pl.ds(at, tiles.rows), :] for ref in memory.q]
    row = at + jnp.arange(tiles.rows) - base
    visible = jnp.minimum(length - static.tokens + q_seq + row // heads + 1, end)
    last_slot = jnp.clip(pl.cdiv(end, page_size) - 1, 0, memory.table.shape[1] - 1)

    def page_of(block):
        slot = jnp.minimum(block * keys // page_size, last_slot)
        return jnp.clip(memory.table[batch, slot], 0, num_pages - 1)

    def step(block, carry):
        acc, m, l, page = carry
        position = block * keys + jnp.arange(keys)
        present = (position < end)[:, None]
        tile = (page, pl.ds(block * keys % page_size, keys), slice(None))
        pools = [plgpu.load(ref.at[tile], mask=present, other=0) for ref in memory.pools]
        # A step ahead: this load, then the tile's, one after the other would be too late.
        page = page_of(block + 1)

        s = sum(dot(q, k, trans_b=True) for q, k in zip(queries, pools, strict=True)) * scale
        seen = (position >= start)[None, :] & (position[None, :] < visible[:, None])
        s = jnp.where(seen, s, NEG_INF)
        new_m = jnp.maximum(m, jnp.max(s, axis=1))
        # A row that has seen no key keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m)
        p, keep = power(s - shift[:, None]), power(m - shift)
        acc = acc * keep[:, None] + dot(p.astype(pools[0].dtype), pools[0])
        return acc, new_m, l * keep + jnp.sum(p, axis=1), page

    first = start // keys
    carry = (
        jnp.zeros((tiles.rows, latent), jnp.float32),
        jnp.full((tiles.rows,), NEG_INF, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
        page_of(first),
    )
    acc, m, l, _ = lax.fori_loop(first, pl.cdiv(end, keys), step, carry)
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    return row, acc / l[:, None], jnp.where(empty, NEG_INF, m + jnp.log2(l))


def run_partial(memory: Memory, static: Static, words: Instruction, launch) -> None:
    """Attention of a group of query tokens over some of their sequence's keys."""
    uid, dst_batch, dst_seq, batch, q_seq, start, end, length = (words[i] for i in range(1, 9))
    outgrown = jnp.bool_(False)
    if memory.lengths is not None:
        present = jnp.maximum(memory.lengths[batch], 0)
        outgrown, length = present > length, present
        end = jnp.minimum(end, present)
    end = jnp.maximum(end, start)
    rows = jnp.minimum(QUERY_TOKENS, static.tokens - q_seq) * static.heads
    result = _result(static, dst_batch, dst_seq, uid, 0)

    def tile(index, _) -> None:
        first_row = index * static.tiles.rows
        row, acc, lse = _attend(memory, static, batch, q_seq, start, end, length, first_row)
        # Keys that no instruction reads would go missing without a word.
        acc = jnp.where(outgrown, jnp.nan, acc)
        mine = (row >= first_row) & (row < rows)
        result.write(memory, row, acc, lse, mine)

    if static.slot_rows <= static.tiles.rows:
        tile(0, None)
    else:
        lax.fori_loop(0, pl.cdiv(rows, static.tiles.rows), tile, None)

    @pl.when(dst_batch < 0)
    def _():
        publish(memory.signals, uid, launch, static.interpret)


def run_reduction(memory: Memory, static: Static, words: Instruction, launch) -> None:
    """One query token's results put together, a few at a time, in the order of the list."""
    uid, inputs, dst_batch, dst_seq = words[1], words[2] + 1, words[3], words[4]
    heads, latent = static.heads, memory.out.shape[1]
    slot = dst_seq % token_groups(static.tokens)[1]
    # All of them in registers at once, beside the sum.
    at_once = max(1, static.tiles.num_warps // 2)
    power = functools.partial(exp2, interpret=static.interpret)
    head, column = jnp.arange(heads), jnp.arange(latent)

    def dependency(place):
        return words[FIRST_DEPENDENCY + jnp.minimum(place, inputs - 1)]

    def step(index, carry):
        acc, m, l, late = carry
        place = index * at_once
        uids = dependency(place + jnp.arange(at_once))
        late |= ~wait_for(memory.signals, uids, launch, static.patience, static.interpret)
        parts, lses = [], []
        for i in range(at_once):
            row = dependency(place + i) * static.slot_rows + slot * heads + head
            present = jnp.broadcast_to(place + i < inputs, (heads,))
            lses.append(plgpu.load(memory.part_lse.at[row], mask=present, other=NEG_INF))
            part = memory.part.at[row[:, None], column[None, :]]
            parts.append(plgpu.load(part, mask=present[:, None], other=0))
        new_m = functools.reduce(jnp.maximum, lses, m)
        # Inputs that have all seen no key give 0 and -inf, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m)
        keep, weights = power(m - shift), [power(lse - shift) for lse in lses]
        acc = acc * keep[:, None] + sum(
            part * weight[:, None] for part, weight in zip(parts, weights, strict=True)
        )
        return acc, new_m, l * keep + sum(weights), late

    carry = (
        jnp.zeros((heads, latent), jnp.float32),
        jnp.full((heads,), NEG_INF, jnp.float32),
        jnp.zeros((heads,), jnp.float32),
        jnp.bool_(False),
    )
    acc, m, l, late = lax.fori_loop(0, pl.cdiv(inputs, at_once), step, carry)
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    acc = jnp.where(late, jnp.nan, acc / l[:, None])
    lse = jnp.where(empty, NEG_INF, m + jnp.log2(l))
    result = _result(static, dst_batch, dst_seq, uid, slot)
    result.write(memory, head, acc, lse, jnp.full((heads,), True))

    @pl.when(late)
    def _():
        memory.signals[LATE] = uid + 1

    # Also where it is late: its consumer need not wait in vain as well.
    @pl.when(dst_batch < 0)
    def _():
        publish(memory.signals, uid, launch, static.interpret)
