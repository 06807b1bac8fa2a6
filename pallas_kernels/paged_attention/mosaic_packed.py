"""What consumers do with an e4m3 cache: its keys stay so in shared memory.

The copy engine brings them as they lie, and turns' and rows' products, which have keys on M, take
that operand from registers (mosaic_unpack.py). e4m3 to float16 is exact, and one instruction for
two numbers: scales are not applied to keys but to their scores, group by group of columns, and to
probabilities.
"""

# The stubs of Pallas' accumulators say less than is there.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.mosaic_block import BOX, KEYS, STRIPE, Block
from pallas_kernels.paged_attention.mosaic_inline import over_rows
from pallas_kernels.paged_attention.mosaic_unpack import (
    OPERAND,
    in_row_order,
    load_scales,
    unpack_rows,
)
from pallas_kernels.precision import FP8

BOUND = 13
"""Queries are brought below 2**BOUND: float16 ends at 2**16, and loses 2**-37 of that."""
PACKED_GROWTH, PACKED_LIFT = 14, 6
"""Probabilities times scales stay below 2**PACKED_GROWTH, and their greatest is 2**PACKED_LIFT at
first: float16 has room above and below."""

ROOMY_ROWS = 16
"""Up to as many of a consumer leave registers for several products on their way."""


def pack_queries(
    q_nope: Float[Array, "rows latent"],
    q_pe: Float[Array, "rows rope"],
    sm_scale: Float[Array, ""],
    *,
    rope_packed: bool,
) -> tuple[Float[Array, "rows latent"], Float[Array, "rows rope"], Float[Array, " rows"]]:
    """(queries for unpacked keys, the rope part, what a row's scores are to be multiplied with).

    Each row is scaled by a power of 2, which only float16's end could make inexact.
    rope_packed: whether the rope keys are e4m3, too.
    """
    numbers = [q.astype(jnp.float32) for q in (q_nope, q_pe)]
    most = jnp.max(jnp.abs(jnp.concatenate(numbers, axis=-1)), axis=-1)
    up = jnp.clip(BOUND - jnp.frexp(most)[1], -100, 100)
    q, turned = (jnp.ldexp(q, up[:, None]) for q in numbers)
    turned = in_row_order(turned.astype(OPERAND)) if rope_packed else turned.astype(q_pe.dtype)
    return in_row_order(q.astype(OPERAND)), turned, jnp.ldexp(sm_scale, -up)


def packed_scores(c: Block, n, z, rows, first, length) -> tuple[Array, list[Array]]:
    """(scores of tile n by keys and rows, without the rows' factors; each group's scales of keys).

    z: 0, as for `add_scores`. rows: of the block's, this consumer's. first: key of the tile, of
    `length`.
    """
    place = c.rope_place(n)
    shape = (KEYS, rows.size)
    own_rope = c.rope and c.kpe.dtype != FP8  # as it is

    def wait(barrier):
        with jax.named_scope("wait for keys"):
            plgpu.barrier_wait(barrier)

    def add_latents(sums, i: int, stripe: int):
        at = c.stripe_place(n, stripe)
        wait(c.full.at[at])
        for box in range(0, STRIPE, BOX):
            keys = unpack_rows(c, c.k_s.at[at], box)
            add_product(c, sums, i, keys, c.q_s.at[stripe + z, rows, pl.ds(box, BOX)])

    def add_rope(sums, i: int):
        keys = c.rope_s.at[place] if own_rope else unpack_rows(c, c.rope_s.at[place], 0)
        add_product(c, sums, i, keys, c.q_rope_s.at[z, rows])

    if not c.groups:

        def add_all(sums):
            for stripe in range(c.stripes):
                add_latents(sums, 0, stripe)
            if c.rope:
                wait(c.full_rope.at[place])
            if c.rope and not own_rope:
                add_rope(sums, 0)

        total = with_sums(c, add_all, [shape])[0] * c.scale[1]
        if own_rope:
            total += with_sums(c, functools.partial(add_rope, i=0), [shape])[0]
        return total, []

    # Each group's sum is scaled by itself; as many at once as leave registers for values.
    together = 64 // rows.size if rows.size <= ROOMY_ROWS else 1
    total, scales = jnp.zeros(shape, jnp.float32), []
    total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    for begin in range(0, c.groups, together):
        batch = range(begin, min(begin + together, c.groups))

        def add_batch(sums, batch=batch):
            for i, stripe in enumerate(batch):
                add_latents(sums, i, stripe)

        sums = with_sums(c, add_batch, [shape] * len(batch))
        if not scales:
            wait(c.full_rope.at[place])
            scales = _key_scales(c, place, first, length)
        for one, group in zip(sums, batch, strict=True):
            total += one * over_rows(scales[group], shape)
    if c.rope:
        total += with_sums(c, functools.partial(add_rope, i=0), [shape])[0]
    return total, scales


def _key_scales(c: Block, place, first, length) -> list[Array]:
    """Of each group of columns the scale of every key from `first` on, 0 behind the last one."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    key = first + plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=layout)
    return [jnp.where(key < length, scale, 0.0) for scale in load_scales(c, place)]


def with_sums(c: Block, add, shapes) -> list[Array]:
    """What `add` makes of sums of products, 0 at first."""
    if c.interpret:
        sums = [jnp.zeros(shape, jnp.float32) for shape in shapes]
        add(sums)
        return sums

    def run(*sums):
        add(sums)
        with jax.named_scope("scores"):
            return [one[...] for one in sums]

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def add_product(c: Block, sums, i: int, a, b):
    """Adds a @ b.T to sums[i]; a: in registers, or like b in shared memory."""
    if c.interpret:
        a = a if isinstance(a, jax.Array) else a[...]
        sums[i] += lax.dot_general(
            *(a.astype(jnp.float32), b[...].astype(jnp.float32)), (((1,), (1,)), ((), ()))
        )
    else:
        plgpu.wgmma(sums[i], a, b.transpose((1, 0)))
        # The registers of the product before are free again.
        plgpu.wgmma_wait(1 if b.shape[0] <= ROOMY_ROWS else 0)


def logarithm(weights: list[Array], shape) -> Array:
    """Of the greatest weight of each key, over all rows; as if it were 2**-60 at least."""
    most = functools.reduce(jnp.maximum, [jnp.abs(weight) for weight in weights])
    return over_rows(jnp.log2(jnp.maximum(most, 2.0**-60)), shape)
