"""Paged decode on the Mosaic GPU kernel: a unit is a tile of a request's rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_attention import PagedProblem, Units, most_slots, pack
from pallas_kernels.paged_attention.merge import merge_parts
from pallas_kernels.paged_attention.mosaic_gpu import (
    BOX,
    KEYS,
    ROWS,
    MosaicTiles,
    attend_pages_mosaic,
)
from pallas_kernels.paged_attention.mosaic_merge import merge_parts_mosaic
from pallas_kernels.paged_attention.tiles import DEFAULT_CORES, clip_length
from pallas_kernels.paged_decode.splits import fixed_splits
from pallas_kernels.precision import GROUP
from pallas_kernels.schedule import WorkerPlan, plan_workers, spread

OLDEST_JAX = (0, 11)
TURNS_ROWS = 16
"""Up to as many query rows have room for the sums of both consumers' turns."""
TWINS_ROWS, TWINS_REQUESTS = 32, 64
"""More rows than those, up to as many of up to as many requests, still stand on the products' N: a
tile takes less time. More requests wait for memory, and twins, who both read every tile, take more
power."""
UNCHECKED = "few rows of an e4m3 cache or of listed tokens, not checked on a GPU yet"
FEW_ROWS, FEW_REQUESTS = 16, 8
"""Up to as many rows of up to as many requests, Triton's kernel is faster: it starts sooner."""


def unsupported(problem: PagedProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"jax is {jax.__version__}, Mosaic GPU's copies and its interpreter need 0.11"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"the dtype is {problem.dtype}, the tensor cores take bfloat16 and float16"
    if problem.latent % (2 * BOX) or problem.latent > 512:
        return f"latent is {problem.latent}, two halves of whole boxes need 128, 256, 384 or 512"
    if problem.rope not in (0, BOX):
        return f"rope is {problem.rope}, a box of columns is {BOX} (or none)"
    if problem.scaled is None and not _whole_boxes(problem.page_size):
        return (
            f"the page size is {problem.page_size}, the copy engine takes 8, 16, 32, "
            f"or a multiple of {KEYS}"
        )
    return None


def _whole_boxes(page_size: int) -> bool:
    """Whether the copy engine can bring a tile of keys, by boxes of 8 at least."""
    return page_size % 8 == 0 and (page_size % KEYS == 0 or KEYS % page_size == 0)


def _scales_fit(problem: PagedProblem) -> bool:
    """Whether the copy engine can bring a tile's scales: it writes to multiples of 128 bytes."""
    groups = problem.latent // GROUP if problem.scaled == "slot" else 0
    return min(problem.page_size, KEYS) * groups * 4 % 128 == 0


def unfit(device: Device) -> str | None:
    """None if `device` is a Hopper GPU, which has the instructions, else the reason why not."""
    return None if device.is_hopper else f"needs a Hopper GPU, this is a {device}"


def outrun(problem: PagedProblem) -> str | None:
    """None if no other backend is faster at `problem`, else the reason why."""
    if (problem.scaled or problem.op == "token_sparse") and problem.rows <= TWINS_ROWS:
        return UNCHECKED
    if problem.rows <= FEW_ROWS and problem.batch <= FEW_REQUESTS:
        return (
            f"{problem.batch} requests of {problem.rows} query rows, too few for blocks of {ROWS}"
        )
    return None


def default_mosaic_tiles(problem: PagedProblem) -> MosaicTiles:
    """One block for up to 64 rows, whose keys nobody else reads, in turns where these have room;
    else clusters of two, with as many products as the tensor cores can take, for which the seesaw
    has the shorter way.

    Keys by token come through registers, and many rows' of an e4m3 cache. Then a block has fewer
    registers for its consumers, and no multicast.
    """
    scaled = problem.scaled is not None
    gathers = scaled and (problem.rows > TWINS_ROWS or not _scales_fit(problem))
    gathers |= not _whole_boxes(problem.page_size)
    if problem.rows <= TURNS_ROWS:
        return MosaicTiles(cluster=1, order="turns", ahead=5 if gathers else 0)
    if gathers:
        if problem.rows <= TWINS_ROWS:
            return MosaicTiles(cluster=1, order="twins", ahead=4)
        return MosaicTiles(cluster=1, order="seesaw", ahead=2)
    if scaled:
        return MosaicTiles(cluster=1, order="rows")
    if problem.rows > ROWS:
        return MosaicTiles(cluster=2, order="seesaw")
    few = problem.rows <= TWINS_ROWS and problem.batch <= TWINS_REQUESTS
    return MosaicTiles(cluster=1, order="twins" if few else "line")


def padded_rows(problem: PagedProblem, tiles: MosaicTiles) -> int:
    """A request's rows as the copy engine can take them: whole boxes of 8, or whole tiles."""
    unit = 8 if problem.rows <= ROWS else ROWS * tiles.cluster
    if tiles.shares_rows and problem.rows <= ROWS:
        unit = 16  # boxes of 8 for each consumer
    return -(-problem.rows // unit) * unit


class _Plan(NamedTuple):
    """The kernel's table, the merges', and static sizes."""

    table: Int[Array, "rows_of_work 12"]
    merges: Int[Array, "merges 5"]
    splits: Int[Array, "1"]
    workers: int
    slots: int


def plan_work(
    length: Int[Array, " batch"],
    start: Int[Array, " batch"],
    problem: PagedProblem,
    tiles: MosaicTiles,
    device: Device,
    *,
    num_splits: int | None,
    deterministic: bool,
    named: Int[Array, " batch"] | None = None,
) -> _Plan:
    """Who does what, for requests of `padded_rows` each."""
    rows, tile_rows = padded_rows(problem, tiles), ROWS * tiles.cluster
    spans = -(-rows // tile_rows)
    request = jnp.repeat(jnp.arange(problem.batch, dtype=jnp.int32), spans)
    span = jnp.tile(jnp.arange(spans, dtype=jnp.int32), problem.batch)
    whole = jnp.full_like(request, problem.rows)
    units = Units(
        base=request * rows,
        offset=span * tile_rows,
        rows=whole,
        owned=whole,
        first_id=start[request],
        length=length[request],
        seen=(length - problem.tokens + 1 if named is None else named)[request],
    )
    steps = (units.length + tiles.step - 1) // tiles.step
    most_steps = -(-problem.num_ids * problem.page_size // tiles.step)
    cores = (device.num_cores or DEFAULT_CORES) // tiles.cluster
    workers = max(1, min(cores, request.shape[0] * most_steps))
    split = fixed_splits(
        steps, problem, tiles.step, num_splits=num_splits, deterministic=deterministic
    )
    plan = (
        plan_workers(steps, workers) if split is None else WorkerPlan(split, spread(split, workers))
    )
    slots = most_slots(plan.split.unit.shape[0], request.shape[0])
    work = pack(units, plan.split)
    # A worker's row, then each segment's: see attend_pages_mosaic.
    first, last = plan.first[:-1], plan.first[1:]
    row = jnp.concatenate(
        [
            jnp.minimum(first, work.segments.shape[0] - 1),
            jnp.arange(work.segments.shape[0], dtype=jnp.int32),
        ]
    )
    bounds = jnp.zeros((row.shape[0], 2), jnp.int32)
    bounds = bounds.at[:workers].set(jnp.stack([first, last], axis=1))
    table = jnp.concatenate([bounds, work.segments[row]], axis=1)
    return _Plan(table, work.merges, work.splits, workers, slots)


def paged_decode_mosaic(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    *,
    num_splits: int | None,
    deterministic: bool,
    interpret: bool,
    tiles: MosaicTiles | None = None,
    profile: str = "",
    named: Int[Array, " batch"] | None = None,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """`paged_decode` on Mosaic GPU; `tiles` overrides the choice, for tuning.

    named: as in `paged_decode_triton`.
    profile: a folder for a trace of the kernel's stages, see attend_pages_mosaic.
    """
    batch, tokens, heads, latent = q_nope.shape
    problem = PagedProblem.of("paged_decode", q_nope, q_pe, ckv_cache, page_ids, batch, kv_scales)
    tiles = tiles or default_mosaic_tiles(problem)
    rows = padded_rows(problem, tiles)

    def flat(q: Array) -> Array:
        q = q.reshape(batch, problem.rows, -1)
        if rows > problem.rows:
            q = jnp.pad(q, ((0, 0), (0, rows - problem.rows), (0, 0)))
        return q.reshape(batch * rows, -1)

    length = clip_length(length, start, problem)
    plan = plan_work(
        *(length, start, problem, tiles, current_device()),
        num_splits=num_splits,
        deterministic=deterministic,
        named=named,
    )
    out, lse, part, part_lse = attend_pages_mosaic(
        *(flat(q_nope), flat(q_pe), ckv_cache, kpe_cache, page_ids, sm_scale),
        plan.table,
        workers=plan.workers,
        slots=plan.slots,
        rows=rows,
        heads=heads,
        tokens=tokens,
        tiles=tiles,
        sparse=named is not None,
        interpret=interpret,
        profile=profile,
        kv_scales=kv_scales,
    )
    if plan.slots:
        slot_rows = part.shape[1]
        merge = functools.partial(merge_parts, interpret=True) if interpret else merge_parts_mosaic
        out, lse = merge(
            *(out, lse),
            *(part.reshape(-1, latent), part_lse.reshape(-1), plan.merges, plan.splits),
            slot_rows=slot_rows,
            deterministic=deterministic,
        )
    out, lse = out.reshape(batch, rows, latent), lse.reshape(batch, rows)
    if rows > problem.rows:
        out, lse = out[:, : problem.rows], lse[:, : problem.rows]
    return out.reshape(batch, tokens, heads, latent), lse.reshape(batch, tokens, heads)
