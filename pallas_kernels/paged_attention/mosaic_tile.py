"""What the consumers of the Mosaic GPU kernel do with one tile of keys, whatever their schedule.

Legend: s scores, p probabilities, m running maximum, l running sum of exponentials, all in base 2;
acc the sum of latents so far, relative to m.
"""

# Older versions of jax, which `unsupported` refuses, load only with an index.
# pyright: reportCallIssue=false

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.exponential import NEG_INF
from pallas_kernels.paged_attention.mosaic_block import (
    BOX,
    GROWTH,
    KEYS,
    LOWEST,
    ROWS,
    Block,
)
from pallas_kernels.paged_attention.mosaic_inline import fence, over_columns, over_rows, synchronize
from pallas_kernels.paged_attention.units import Segment

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def add_scores(c: Block, acc, place, z):
    """acc + the queries' products with the tile's keys, unscaled.

    z is always 0, but the compiler cannot know it: it would keep some seventy 64-bit matrix
    descriptors of the queries in registers, and the kernel would spill.
    """
    for half in (0, 1):
        with jax.named_scope("wait for keys"):
            plgpu.barrier_wait(c.full.at[2 * place + half])
        plgpu.wgmma(acc, c.q_s.at[half + z], c.k_s.at[place, half].transpose((1, 0)))
    if c.rope:
        with jax.named_scope("wait for keys"):
            plgpu.barrier_wait(c.full_rope.at[place])
        plgpu.wgmma(acc, c.q_rope_s.at[z], c.p_s.at[place].transpose((1, 0)))


def always_zero(i):
    return lax.shift_right_logical(i, jnp.int32(30))


def limits(c: Block, segment: Segment, rows=None, layout=ROW_LAYOUT):
    """How many keys each row of the block sees, or each of these."""
    if c.tokens == 1:
        return segment.length
    first, count = (0, ROWS) if rows is None else (rows.start, rows.size)
    row = segment.offset + c.block * ROWS + first
    row += plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=layout)
    return jnp.minimum(segment.seen + lax.div(row, jnp.int32(c.heads)), segment.length)


def hide(c: Block, s, tile, segment: Segment, limit, place, key_axis: int = 1):
    """Scores of keys that a row does not see become the lowest; place: of a sparse tile's bias."""
    first = tile * KEYS
    over_keys, of_keys = (over_rows, over_columns) if key_axis == 1 else (over_columns, over_rows)

    def hidden(s):
        layout = plgpu.Layout.WGMMA
        if c.sparse:
            bias = plgpu.load(c.bias_s.at[place], layout=layout.reduce(1 - key_axis))
            return s + of_keys(bias, s.shape)
        key = first + plgpu.broadcasted_iota(jnp.int32, s.shape, key_axis, layout=layout)
        bound = limit if c.tokens == 1 else over_keys(limit, s.shape)
        return jnp.where(key < bound, s, LOWEST)

    return lax.cond(first + KEYS > segment.seen, hidden, lambda s: s, s)


def clear_unused(c: Block, tile, segment: Segment, place):
    """Slots behind the request's last token may hold NaN, which 0 does not silence."""
    if c.tiles.ahead:
        return  # what comes through registers is 0 there
    valid = segment.length - tile * KEYS

    @pl.when(valid < KEYS)
    def _():
        columns = [pl.ds(first, BOX) for first in range(0, c.half, BOX)]
        clear([c.k_s.at[place, half, :, box] for half in (0, 1) for box in columns], valid)


def clear(boxes, valid):
    """Keys from `valid` on become 0."""
    key = plgpu.broadcasted_iota(jnp.int32, (KEYS, BOX), 0, layout=plgpu.Layout.WGMMA)
    for ref in boxes:
        values = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
        ref[...] = jnp.where(key < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def reduce_rows(pairwise, whole, x: Array) -> Array:
    """`whole(x, axis=1)` with short chains of dependent operations."""
    while x.shape[1] > 16:
        half = x.shape[1] // 2
        x = pairwise(x[:, :half], x[:, half:])
    return whole(x, axis=1)


def softmax(m, s):
    """(p, the maximum that they are relative to)."""
    top = reduce_rows(jnp.maximum, jnp.max, s)
    new_m = jnp.where(top > m + GROWTH, top, m)
    return jnp.exp2(s - over_rows(new_m, s.shape)), new_m


def sum_rows(p):
    return reduce_rows(jnp.add, jnp.sum, p)


def publish(c: Block, p, row, place):
    """p, and a number for each row, for the consumers that wait for them."""
    # p takes the place of the keys' rope columns, which every warp must have used.
    plgpu.commit_smem() if c.interpret else synchronize()
    c.p_s.at[place][...] = p
    c.row_s.at[place][...] = row
    plgpu.commit_smem() if c.interpret else fence()
    plgpu.barrier_arrive(c.p_ready.at[place])


def no_sums():
    """(m, l) before the first tile."""
    m, l = (jnp.full((ROWS,), value, jnp.float32) for value in (LOWEST, 0))
    return plgpu.layout_cast(m, ROW_LAYOUT), plgpu.layout_cast(l, ROW_LAYOUT)


def close(m, l):
    """(the factor of acc, the log-sum-exp): 0 and -inf for rows that saw nothing."""
    empty = m <= LOWEST / 2
    l = jnp.where(empty, 1.0, l)
    return jnp.where(empty, 0.0, 1.0 / l), jnp.where(empty, NEG_INF, m + jnp.log2(l))
