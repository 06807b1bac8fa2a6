"""The shape of a causal prefill, the tiles it is cut into, and which request each tile serves."""

import dataclasses
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.device import Device
from pallas_kernels.tuning import tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalProblem:
    """Everything static about a call."""

    batch: int
    tokens: int
    keys: int
    heads: int
    width: int
    value_width: int
    dtype: str
    causal: bool

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, q_start: Array, causal: bool) -> Self:
        """The problem that arrays of these shapes pose."""
        tokens, heads, width = q.shape
        return cls(
            batch=q_start.shape[0],
            tokens=tokens,
            keys=k.shape[0],
            heads=heads,
            width=width,
            value_width=v.shape[-1],
            dtype=str(q.dtype),
            causal=causal,
        )


def split_width(width: int) -> tuple[int, ...] | None:
    """`width` as one power of two or a sum of two, larger first, all from 16; None if neither.

    Triton's tiles have power-of-two sides: MLA's 192 is held as 128 and 64.
    """
    first = 1 << (width.bit_length() - 1)
    parts = (first, width - first) if width > first else (first,)
    fits = parts[-1] >= 16 and parts[-1] & (parts[-1] - 1) == 0
    return parts if fits else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalTiles:
    """A block of `rows` queries meets `keys` keys a step (for dk and dv, the other way round)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """The tiles of the two kernels of the backward pass."""

    dq: CausalTiles
    dkv: CausalTiles


DEFAULT_CORES = 132
SHARED_BYTES = 227 * 1024


def _stages(problem: CausalProblem, held: int, streamed: int, at_most: int) -> int:
    """As many steps in flight as shared memory has room for, at least one.

    A block keeps `held` elements and streams `streamed` elements a step.
    """
    itemsize = jnp.dtype(problem.dtype).itemsize
    room = SHARED_BYTES // itemsize - held
    return max(1, min(at_most, room // streamed))


def _tall(problem: CausalProblem, device: Device) -> bool:
    """Whether tall blocks pay: they read the keys less often, but need long requests, and many."""
    cores = device.num_cores or DEFAULT_CORES
    return problem.tokens > 64 * problem.batch and problem.tokens * problem.heads >= 128 * cores


def default_tiles(problem: CausalProblem, device: Device) -> CausalTiles:
    """Tiles of the forward kernel on a device that has no table of its own. Found on an H200."""
    if problem.dtype == "float32":
        return CausalTiles(rows=32, keys=32, num_warps=4, num_stages=2)
    both, tall = problem.width + problem.value_width, _tall(problem, device)
    rows, keys = (128 if tall else 64), 64
    return CausalTiles(
        rows=rows,
        keys=keys,
        num_warps=8 if tall else 4,
        num_stages=_stages(problem, rows * problem.width, keys * both, 3 if tall else 2),
    )


def choose_tiles(problem: CausalProblem, device: Device) -> CausalTiles:
    """Tiles of the forward kernel, from shapes alone, so that one program serves all lengths.

    The device's tuned ones, which were measured on a long request, hold where blocks are tall.
    """
    key = {"width": problem.width, "value_width": problem.value_width, "dtype": problem.dtype}
    found = tuned("causal_prefill", device, **key) if _tall(problem, device) else None
    return CausalTiles(**found) if found else default_tiles(problem, device)


def choose_backward_tiles(problem: CausalProblem) -> BackwardTiles:
    """Tiles of the backward kernels, from shapes alone.

    Each holds one side's rows of two arrays and streams the other's. The sums of dk and dv leave
    a block few registers: more rows a step than these would spill.
    """
    if problem.dtype == "float32":
        tiles = CausalTiles(rows=32, keys=32, num_warps=4, num_stages=1)
        return BackwardTiles(dq=tiles, dkv=tiles)
    both = problem.width + problem.value_width
    return BackwardTiles(
        dq=CausalTiles(
            rows=128,
            keys=64,
            num_warps=8,
            num_stages=_stages(problem, 128 * both, 64 * both, 2),
        ),
        dkv=CausalTiles(
            rows=32,
            keys=64,
            num_warps=4,
            num_stages=_stages(problem, 64 * both, 32 * both, 3),
        ),
    )


class QueryTiles(NamedTuple):
    """For each tile: its rows of q, and what they see.

    The tile owns the rows first : stop, of which those before `query_stop` are queries; row r
    sees the first r + shift (causal) or shift keys from key_start on. All of the tile's queries
    see `whole` keys, and none sees more than `seen`.
    """

    first: Int[Array, " tiles"]
    stop: Int[Array, " tiles"]
    query_stop: Int[Array, " tiles"]
    key_start: Int[Array, " tiles"]
    shift: Int[Array, " tiles"]
    whole: Int[Array, " tiles"]
    seen: Int[Array, " tiles"]


def plan_query_tiles(
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    kv_start: Int[Array, " batch"],
    kv_count: Int[Array, " batch"],
    *,
    tokens: int,
    rows: int,
    causal: bool,
) -> QueryTiles:
    """Tiles of `rows` that own each of the `tokens` rows once, the last ones first.

    A request owns the rows up to the next one's first, so that rows in no request are written
    too, by a tile that sees nothing for them; the rows before the first request are owned by a
    request of no queries that stands before it. Later queries see more keys: they start first,
    and the light tiles fill what is left.
    """

    def with_none_first(counts: Array) -> Array:
        return jnp.pad(counts, (1, 0))

    starts, counts, key_starts, key_counts = map(
        with_none_first, (q_start, q_count, kv_start, kv_count)
    )
    stops = jnp.pad(q_start, (0, 1), constant_values=tokens)
    tiles_of = (stops - starts + rows - 1) // rows
    tile_stops = jnp.cumsum(tiles_of, dtype=jnp.int32)

    # The tiles past the last one fall to the last request, beyond its rows: they own none.
    batch = q_start.shape[0]
    tile = jnp.arange(-(-tokens // rows) + batch, dtype=jnp.int32)[::-1]
    request = jnp.searchsorted(tile_stops, tile, side="right", method="compare_all")
    request = jnp.minimum(request, batch)

    first = starts[request] + (tile - (tile_stops - tiles_of)[request]) * rows
    stop = jnp.minimum(first + rows, stops[request])
    query_stop = jnp.minimum(first + rows, (starts + counts)[request])
    shift = key_counts - (starts + counts - 1 if causal else 0)
    shift = shift[request]
    last_sees = query_stop - 1 + shift if causal else shift
    first_sees = first + shift if causal else shift
    seen = jnp.where(query_stop > first, jnp.maximum(last_sees, 0), 0)
    return QueryTiles(
        first=first,
        stop=stop,
        query_stop=query_stop,
        key_start=key_starts[request],
        shift=shift,
        whole=jnp.clip(first_sees, 0, seen),
        seen=seen,
    )
