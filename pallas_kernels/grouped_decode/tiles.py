"""The shape of a grouped decode, as the paged problem that it is, and its tiles.

To the plan and the merge a request's key head is a request of its own: `group` query rows over the
blocks of that head.
"""

from jaxtyping import Array

from pallas_kernels.device import Device
from pallas_kernels.grouped_attention.blocks import BLOCK, stages_that_fit, unsupported_width
from pallas_kernels.paged_attention import PagedProblem, PagedTiles
from pallas_kernels.tuning import tuned


def problem_of(q: Array, k_cache: Array) -> PagedProblem:
    """The problem that q [B, Hq, D] and k_cache [B, Hk, blocks, 64, D] pose."""
    batch, heads, width = q.shape
    kv_heads, blocks = k_cache.shape[1:3]
    units = batch * kv_heads
    return PagedProblem(
        op="grouped_decode",
        batch=units,
        tokens=1,
        heads=heads // kv_heads,
        latent=width,
        rope=0,
        page_size=BLOCK,
        dtype=str(q.dtype),
        num_ids=units * blocks,
    )


def unsupported(problem: PagedProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    return unsupported_width(problem.latent)


def default_tiles(problem: PagedProblem, mask_bytes: int = 0) -> PagedTiles:
    """Tiles on a device that has no table of its own: as much in flight as a core has room for.

    Two blocks a core take turns; heads so wide that these would have one step in flight get one.
    mask_bytes: those of a mask's element.
    """
    rows = next((size for size in (16, 32) if problem.rows <= size), 64)
    keys = BLOCK if problem.dtype != "float32" else BLOCK // 2
    stages = {
        number: stages_that_fit(
            rows,
            keys,
            width=problem.latent,
            dtype=problem.dtype,
            mask_bytes=mask_bytes,
            blocks_per_core=number,
        )
        for number in (1, 2)
    }
    blocks_per_core = 2 if stages[2] > 1 else 1
    return PagedTiles(
        rows=rows,
        keys=keys,
        num_warps=4,
        num_stages=max(1, min(4, stages[blocks_per_core])),
        blocks_per_core=blocks_per_core,
    )


def choose_tiles(problem: PagedProblem, device: Device, mask_bytes: int = 0) -> PagedTiles:
    """The device's tuned tiles, else the default ones; neither batch nor lengths matter.

    Tuned ones are those without a mask, which takes memory of its own.
    """
    key = {"rows": problem.rows, "width": problem.latent, "dtype": problem.dtype}
    found = tuned(problem.op, device, **key) if mask_bytes == 0 else None
    return PagedTiles(**found) if found else default_tiles(problem, mask_bytes)
