"""Paged prefill on the Triton kernel: a unit is a tile of one request's rows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import current_device
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
from pallas_kernels.schedule import balanced_share, most_segments, plan_segments

UNIT_ROWS = 128
"""Rows whose blocks run side by side, so that all but one find the keys in the L2 cache."""


def cut_units(
    length: Int[Array, " batch"],
    start: Int[Array, " batch"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    *,
    tokens: int,
    heads: int,
    unit_rows: int,
) -> Units:
    """Each request's rows in units of `unit_rows`, the padding behind them included.

    There are as many units as there could be: rows / unit_rows, and one more a request.
    """
    batch = start.shape[0]
    # Clamped, so that garbage in traced values cannot lead outside the arrays.
    q_start = jnp.clip(lax.cummax(q_start), 0, tokens)
    q_count = jnp.clip(q_count, 0, jnp.append(q_start[1:], jnp.int32(tokens)) - q_start)
    owned = (jnp.append(q_start[1:], jnp.int32(tokens)) - q_start) * heads
    tiles = (owned + unit_rows - 1) // unit_rows
    past = jnp.cumsum(tiles, dtype=jnp.int32)
    unit = jnp.arange(-(-tokens * heads // unit_rows) + batch, dtype=jnp.int32)
    request = jnp.searchsorted(past, unit, side="right", method="compare_all")
    spare = request == batch
    request = jnp.minimum(request, batch - 1).astype(jnp.int32)
    index = unit - (past - tiles)[request]
    return Units(
        base=q_start[request] * heads,
        offset=index * unit_rows,
        rows=q_count[request] * heads,
        owned=jnp.where(spare, 0, owned[request]),
        first_id=start[request],
        length=length[request],
        seen=(length - q_count + 1)[request],
    )


def paged_prefill_triton(
    q_nope: Float[Array, "tokens heads latent"],
    q_pe: Float[Array, "tokens heads rope"],
    ckv_cache: Float[Array, "pages page latent"],
    kpe_cache: Float[Array, "pages page rope"],
    page_ids: Int[Array, " ids"],
    start: Int[Array, " batch"],
    length: Int[Array, " batch"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    sm_scale: Float[Array, ""],
    *,
    max_count: int,
    deterministic: bool,
    interpret: bool,
    tiles: PagedTiles | None = None,
    kv_scales: Float[Array, ""] | Float[Array, "pages page groups"] | None = None,
) -> tuple[Float[Array, "tokens heads latent"], Float[Array, "tokens heads"]]:
    """`paged_prefill` on the Triton lowering; `tiles` overrides the choice, for tuning."""
    del max_count
    tokens, heads, latent = q_nope.shape
    problem = PagedProblem.of(
        "paged_prefill", q_nope, q_pe, ckv_cache, page_ids, start.shape[0], kv_scales
    )
    device = current_device()
    tiles = tiles or choose_tiles(problem, device)
    row_blocks = min(-(-UNIT_ROWS // tiles.rows), -(-tokens * heads // tiles.rows))
    length = clip_length(length, start, problem)
    units = cut_units(
        *(length, start, q_start, q_count),
        tokens=tokens,
        heads=heads,
        unit_rows=row_blocks * tiles.rows,
    )
    # A unit's steps reach as far as its last row sees.
    last_row = jnp.minimum(units.offset + row_blocks * tiles.rows, units.rows) - 1
    visible = jnp.minimum(units.seen + last_row // heads, units.length)
    visible = jnp.where((units.offset < units.rows) & (units.owned > 0), visible, 0)
    steps = (jnp.maximum(visible, 0) + tiles.keys - 1) // tiles.keys
    num_units = steps.shape[0]
    if deterministic:
        plan = plan_segments(steps, jnp.maximum(steps, 1), num_units)
    else:
        workers = choose_workers(tiles, device, row_blocks)
        share = balanced_share(steps, workers)
        plan = plan_segments(steps, share, most_segments(num_units, workers))
    out, lse = attend_pages(
        q_nope.reshape(-1, latent),
        q_pe.reshape(tokens * heads, -1),
        *(ckv_cache, kpe_cache, page_ids, sm_scale),
        pack(units, plan),
        slots=most_slots(plan.unit.shape[0], num_units),
        heads=heads,
        row_blocks=row_blocks,
        tiles=tiles,
        deterministic=deterministic,
        interpret=interpret,
        kv_scales=kv_scales,
    )
    return out.reshape(q_nope.shape), lse.reshape(tokens, heads)
