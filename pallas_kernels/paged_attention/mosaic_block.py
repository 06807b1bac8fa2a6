"""What the warpgroups of a block of the Mosaic GPU kernel share: sizes, names, the work table."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.mosaic_inline import synchronize
from pallas_kernels.paged_attention.units import Segment
from pallas_kernels.precision import GROUP

ROWS = KEYS = BOX = 64
"""Query rows of a block, keys of a tile, columns of a swizzled box."""
STAGES = 2
"""Tiles that shared memory holds, where queries fill 64 rows."""
STRIPE = 2 * BOX
"""Columns of a tile that are loaded and given back together, where they do not."""
LOWEST = -1e30
"""Instead of -inf, whose differences would be NaN."""
GRID, CLUSTER, THREAD = "mla_worker", "mla_cluster", "mla_warpgroup"
"""Axis names that no mesh has: a kernel's names and those of a mesh around it must differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicTiles:
    """cluster: blocks of 64 rows that share their keys: 1, or 2.
    order: how the consumers share the work, see mosaic_gpu.py; rows: for an e4m3 cache alone.
    ahead: pieces of keys on their way to registers, see mosaic_converter.py; 0: the copy engine
    brings keys to shared memory, where turns and rows take e4m3 as it is.
    """

    cluster: int
    order: Literal["twins", "turns", "rows", "line", "seesaw"]
    ahead: int = 0

    @property
    def few_rows(self) -> bool:
        """Whether rows stand on the products' N, and keys come in stripes."""
        return self.order in ("twins", "turns", "rows")

    @property
    def takes_turns(self) -> bool:
        """Whether a tile is one consumer's alone."""
        return self.order == "turns"

    @property
    def shares_rows(self) -> bool:
        """Whether each consumer has half of the rows, and all columns of their sums."""
        return self.order == "rows"

    @property
    def step(self) -> int:
        """Keys of a plan's step."""
        return KEYS * (2 if self.order == "seesaw" else 1)


GROWTH = 8.0
"""A maximum stays where it is until a score passes it by a factor of 2**GROWTH: what it must do is
keep exponentials in range, and as long as it stays, the sums need not be rescaled."""


class Block:
    """What every warpgroup needs: refs by name, static choices, and where this block stands.

    Every warpgroup counts the tiles of its worker, n: tile n has the place n % STAGES of the ring.
    packed: keys are e4m3 in shared memory, see mosaic_packed.py. groups: of columns, each with a
    scale for every key there; 0: there is one for all.
    """

    def __init__(self, refs, tiles, rows, heads, tokens, rope, sparse, interpret, worker, block):
        self.refs, self.tiles, self.rows = refs, tiles, rows
        self.heads, self.tokens = heads, tokens
        self.rope, self.sparse, self.interpret = rope, sparse, interpret
        self.worker, self.block = worker, block
        latent = refs["ckv"].shape[-1]
        self.half, self.stripes = latent // 2, latent // STRIPE
        self.packed = "q_factor" in refs
        self.groups = latent // GROUP if "key_scales" in refs else 0
        self.axes = CLUSTER if tiles.cluster > 1 else None

    def __getattr__(self, name: str) -> Any:
        return self.refs[name]

    def segments_of_worker(self, body, carry):
        """`body(segment, carry)` over the segments of this worker."""
        table, workers = self.refs["work"], lax.axis_size(GRID)
        begin, end = table[self.worker, 0], table[self.worker, 1]

        def step(index, carry):
            row = jnp.where(index == begin, self.worker, workers + index)
            segment = Segment(*(table[row, 2 + i] for i in range(len(Segment._fields))))
            # An empty request has one tile, of which nothing is seen.
            segment = segment._replace(end=jnp.maximum(segment.end, segment.begin + 1))
            return body(segment, carry)

        return lax.fori_loop(begin, end, step, carry)

    @property
    def own_rows(self) -> int:
        """Rows of the block that a consumer does."""
        return self.rows // 2 if self.tiles.shares_rows else self.rows

    def rows_of(self, segment: Segment, own=None):
        """Where this block's tile of queries, or those of its rows, stand among all rows."""
        row = segment.base + segment.offset + self.block * ROWS
        if own is not None:
            row += own.start
        return pl.ds(pl.multiple_of(row, 8), self.rows if own is None else own.size)

    def place(self, n):
        """The place of tile n in the ring."""
        return lax.rem(n, jnp.int32(STAGES))

    @property
    def rings(self) -> int:
        """Rings of stripes. Who takes turns has one of his own: he must see every phase of its
        barriers."""
        return 2 if self.tiles.takes_turns else 1

    @property
    def ring_places(self) -> int:
        """Stripes that a ring holds."""
        return self.refs["k_s"].shape[0] // self.rings

    def stripe_place(self, n, stripe: int):
        """The place of a stripe of tile n."""
        place = lax.rem(self._stripes_before(n, stripe), jnp.int32(self.ring_places))
        return lax.rem(n, jnp.int32(self.rings)) * self.ring_places + place

    def stripe_place_used(self, n, stripe: int):
        """Whether another stripe had that place before."""
        return self._stripes_before(n, stripe) >= self.ring_places

    def _stripes_before(self, n, stripe: int):
        """Stripes that its ring had before this one of tile n."""
        return lax.div(n, jnp.int32(self.rings)) * self.stripes + stripe

    def rope_place(self, n):
        """The place of its rope columns, and of its keys' scales."""
        return lax.rem(n, jnp.int32(self.refs["full_rope"].shape[0]))

    def release(self, place, half: int):
        """Gives the producers this half of a place back, which this warpgroup has read."""
        if self.tiles.cluster > 1:
            # One warp arrives for all four, which must have read it.
            plgpu.commit_smem() if self.interpret else synchronize()
        plgpu.barrier_arrive(self.free.at[2 * place + half])
