"""The shape of an expert feed-forward, and how its (token, expert) pairs become tiles."""

import dataclasses
import math
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.precision import GROUP


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertProblem:
    """Everything static about a call. block: of weights in FP8, what has one scale."""

    tokens: int
    active: int
    experts: int
    inter: int
    dim: int
    dtype: str
    shared: int = 0
    block: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        expert_ids: Array,
        gate_up: Array | BlockScaled,
        shared: tuple[Array | BlockScaled, Array | BlockScaled] | None,
    ) -> Self:
        """The problem that arrays of these shapes pose."""
        tokens, active = expert_ids.shape
        experts, _, inter, dim = gate_up.shape
        return cls(
            tokens=tokens,
            active=active,
            experts=experts,
            inter=inter,
            dim=dim,
            dtype=str(gate_up.dtype),
            shared=0 if shared is None else shared[0].shape[1] // inter,
            block=gate_up.block_size if isinstance(gate_up, BlockScaled) else None,
        )

    @property
    def same_scale(self) -> int | None:
        """Columns in a row that have both scales in common: an activation's, and a weight's."""
        return None if self.block is None else math.gcd(GROUP, self.block[1])

    @property
    def routed_rows(self) -> int:
        """(token, routed expert) pairs: the first rows of the hidden layer."""
        return self.tokens * self.active

    @property
    def rows(self) -> int:
        """Rows of the hidden layer: the routed pairs, then the tokens of each shared expert."""
        return self.routed_rows + self.shared * self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """`rows` pairs of one expert by `columns` outputs a block, `depth` inputs a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def power_of_two_divisor(size: int, at_most: int) -> int:
    return min(size & -size, at_most)


def choose_tiles(problem: ExpertProblem, *, gated: bool) -> ExpertTiles:
    """Tiles for one of the two products: the `gated` one to the hidden layer, or the one back.

    Found on an H200. Few rows are a matter of reading weights at full speed: blocks narrow enough
    that every core has several, of which the gated ones read two matrices.
    """
    outputs, inputs = (problem.inter, problem.dim) if gated else (problem.dim, problem.inter)
    per_expert = problem.routed_rows // problem.experts
    rows = min(max(16, 1 << max(per_expert - 1, 0).bit_length()), 64)
    if problem.routed_rows <= rows:
        columns, num_warps, num_stages = (32, 4, 3) if gated else (16, 2, 4)
    elif rows == 16:
        columns, num_warps, num_stages = 32, 4, 4
    else:
        columns, num_warps, num_stages = 64, 8, 3
    depth = 128 if rows <= 32 else 64
    return ExpertTiles(
        rows=rows,
        columns=power_of_two_divisor(outputs, columns),
        depth=power_of_two_divisor(inputs, min(depth, problem.same_scale or depth)),
        num_warps=num_warps,
        num_stages=num_stages,
    )


class RowTiles(NamedTuple):
    """Which pairs each tile holds: order[first : first + count], all of them `expert`'s."""

    order: Int[Array, " pairs"]
    expert: Int[Array, " tiles"]
    first: Int[Array, " tiles"]
    count: Int[Array, " tiles"]


def plan_row_tiles(
    expert_ids: Int[Array, " pairs"], experts: int, rows: int, *, partial: bool = False
) -> RowTiles:
    """Group pairs by expert into tiles of `rows`; tiles beyond the last have count 0.

    So few pairs that they fit one tile get one each: no sort, and little is read twice. partial:
    pairs of ids from `experts` on are in no tile.
    """
    pairs = expert_ids.shape[0]
    if pairs <= rows:
        # Constants of the program: as computed values they would be launches of their own.
        index = np.arange(pairs, dtype=np.int32)
        count = (expert_ids < experts).astype(jnp.int32) if partial else np.ones_like(index)
        return RowTiles(jnp.asarray(index), expert_ids, jnp.asarray(index), jnp.asarray(count))
    order = jnp.argsort(expert_ids).astype(jnp.int32)
    sizes = (expert_ids[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    tile_ends = jnp.cumsum((sizes + rows - 1) // rows, dtype=jnp.int32)

    tile = jnp.arange(min(pairs, experts) + pairs // rows, dtype=jnp.int32)
    expert = (tile[:, None] >= tile_ends).sum(axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    tile_of_expert = tile - tile_ends[expert] + (sizes[expert] + rows - 1) // rows
    first = ends[expert] - sizes[expert] + tile_of_expert * rows
    return RowTiles(order, expert, first, jnp.clip(ends[expert] - first, 0, rows))
