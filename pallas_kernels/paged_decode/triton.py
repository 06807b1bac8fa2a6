"""Paged decode on the Triton kernel: a unit is a request, all of whose rows share its keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_attention import (
    PagedProblem,
    PagedTiles,
    Units,
    attend_pages,
    choose_tiles,
    most_slots,
    pack,
)
from pallas_kernels.paged_attention.tiles import choose_workers, clip_length
from pallas_kernels.paged_decode.splits import fixed_splits
from pallas_kernels.schedule import SplitPlan, balanced_share, most_segments, plan_segments


def plan_splits(
    length: Int[Array, " batch"],
    problem: PagedProblem,
    tiles: PagedTiles,
    device: Device,
    *,
    num_splits: int | None,
    deterministic: bool,
) -> SplitPlan:
    """Who reads which keys: by all lengths, or, for a fixed rounding, by each request's own."""
    batch = problem.batch
    steps = (jnp.maximum(length, 0) + tiles.keys - 1) // tiles.keys
    most_steps = -(-problem.num_ids * problem.page_size // tiles.keys)
    split = fixed_splits(
        steps, problem, tiles.keys, num_splits=num_splits, deterministic=deterministic
    )
    if split is not None:
        return split
    workers = choose_workers(tiles, device, -(-problem.rows // tiles.rows))
    share = balanced_share(steps, workers)
    # More segments than there can be steps would do nothing.
    return plan_segments(steps, share, min(most_segments(batch, workers), batch * most_steps))


def paged_decode_triton(
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
    tiles: PagedTiles | None = None,
    named: Int[Array, " batch"] | None = None,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """`paged_decode` on the Triton lowering; `tiles` overrides the choice, for tuning.

    named: for pages of one token, any of which one query token may see, how many ids at a request's
    beginning are of the pool; behind them, one outside it stands for no key. None: all name pages.
    """
    batch, tokens, heads, latent = q_nope.shape
    problem = PagedProblem.of("paged_decode", q_nope, q_pe, ckv_cache, page_ids, batch, kv_scales)
    device = current_device()
    tiles = tiles or choose_tiles(problem, device)
    rows = jnp.full(batch, problem.rows, jnp.int32)
    length = clip_length(length, start, problem)
    units = Units(
        base=jnp.arange(batch, dtype=jnp.int32) * problem.rows,
        offset=jnp.zeros(batch, jnp.int32),
        rows=rows,
        owned=rows,
        first_id=start,
        length=length,
        seen=length - tokens + 1 if named is None else named,
    )
    plan = plan_splits(
        length, problem, tiles, device, num_splits=num_splits, deterministic=deterministic
    )
    out, lse = attend_pages(
        q_nope.reshape(-1, latent),
        q_pe.reshape(batch * problem.rows, -1),
        *(ckv_cache, kpe_cache, page_ids, sm_scale),
        pack(units, plan),
        slots=most_slots(plan.unit.shape[0], batch),
        heads=heads,
        row_blocks=-(-problem.rows // tiles.rows),
        tiles=tiles,
        sparse=named is not None,
        deterministic=deterministic,
        interpret=interpret,
        kv_scales=kv_scales,
    )
    return out.reshape(q_nope.shape), lse.reshape(batch, tokens, heads)
