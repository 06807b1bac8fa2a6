"""The shape of a paged attention problem, and the tiles that the Triton kernel cuts it into."""

import dataclasses
from typing import Literal, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.device import Device
from pallas_kernels.precision import FP8, GROUP
from pallas_kernels.tuning import tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedProblem:
    """Everything static about a call of B requests; a decode call has S query tokens each."""

    op: str
    batch: int
    tokens: int
    """Query tokens of each request; 0 if that differs, in prefill."""
    heads: int
    latent: int
    rope: int
    page_size: int
    dtype: str
    num_ids: int
    """Page ids of all requests together, which bounds their keys."""
    scaled: Literal["slot", "tensor"] | None = None
    """Which scales a float8_e4m3fn cache has; None: the cache is of q's dtype."""

    @classmethod
    def of(
        cls,
        op: str,
        q_nope: Array,
        q_pe: Array,
        ckv_cache: Array,
        page_ids: Array,
        batch: int,
        kv_scales: Array | None = None,
    ) -> Self:
        """The problem that arrays of these shapes pose: q_nope [B, S, H, C] or [T, H, C]."""
        return cls(
            op=op,
            batch=batch,
            tokens=q_nope.shape[1] if q_nope.ndim == 4 else 0,
            heads=q_nope.shape[-2],
            latent=q_nope.shape[-1],
            rope=q_pe.shape[-1],
            page_size=ckv_cache.shape[1],
            dtype=str(q_nope.dtype),
            num_ids=page_ids.shape[0],
            scaled=None if ckv_cache.dtype != FP8 else scaling(kv_scales),
        )

    @property
    def rows(self) -> int:
        """Query rows of one request, all of which share its keys; 0 if that differs."""
        return self.tokens * self.heads


def scaling(kv_scales: Array | None) -> Literal["slot", "tensor"]:
    """How scales of this shape belong to an e4m3 cache; None is one scale of 1."""
    return "tensor" if kv_scales is None or kv_scales.ndim == 0 else "slot"


def latent_parts(latent: int, *, e4m3: bool) -> list[tuple[int, int]]:
    """(start, size) of the columns that a kernel holds together: all, or those that share a scale.

    One scale for all of a cache's numbers changes nothing: whole tiles, converted, would not fit
    into shared memory beside 64 rows of queries.
    """
    size = min(GROUP, latent) if e4m3 else latent
    return [(start, size) for start in range(0, latent, size)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedTiles:
    """`rows` queries by `keys` cached tokens a step, in blocks of which a core holds some.

    mask_all: one loop that masks every step, instead of a plain one and a masked one behind it.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    blocks_per_core: int
    mask_all: bool = False


DEFAULT_CORES = 132


def default_tiles(rows: int, dtype: str) -> PagedTiles:
    """Tiles for `rows` queries (0: many) on a device that has no table of its own.

    Found on an H200. 16 rows: one block a core, whose next two steps' keys are on their way while
    it computes. More leave no memory for that. 32 rows: two blocks a core, which take turns; 64:
    one, of 8 warps, on the tensor cores' wide instructions.
    """
    if dtype == "float32":
        return PagedTiles(rows=16, keys=32, num_warps=4, num_stages=2, blocks_per_core=1)
    if 0 < rows <= 16:
        return PagedTiles(rows=16, keys=64, num_warps=4, num_stages=3, blocks_per_core=1)
    if 0 < rows <= 32:
        return PagedTiles(
            rows=32, keys=64, num_warps=4, num_stages=2, blocks_per_core=2, mask_all=True
        )
    return PagedTiles(rows=64, keys=64, num_warps=8, num_stages=2, blocks_per_core=1)


def choose_tiles(problem: PagedProblem, device: Device) -> PagedTiles:
    """The device's tuned tiles, else the default ones.

    They follow from the heads, the query tokens, the page size, the dtypes and the device, and from
    nothing else: the size of the batch and the lengths do not change how a result is rounded.
    """
    found = tuned(
        problem.op,
        device,
        heads=problem.heads,
        rows=problem.rows,
        page_size=problem.page_size,
        dtype=problem.dtype if problem.scaled is None else f"{FP8} by {problem.scaled}",
    )
    return PagedTiles(**found) if found else default_tiles(problem.rows, problem.dtype)


def choose_workers(tiles: PagedTiles, device: Device, row_blocks: int) -> int:
    """How many segments run at a time, each of them `row_blocks` blocks."""
    cores = device.num_cores or DEFAULT_CORES
    return max(1, cores * tiles.blocks_per_core // row_blocks)


def clip_length(
    length: Int[Array, " batch"], start: Int[Array, " batch"], problem: PagedProblem
) -> Int[Array, " batch"]:
    """Lengths that the ids can hold: garbage in traced ones must not lead outside the arrays."""
    ids = jnp.clip(problem.num_ids - jnp.clip(start, 0, problem.num_ids), 1)
    return jnp.clip(length, 0, ids * problem.page_size)
