"""Paged decode attention as a Pallas kernel, lowered through Triton.

One block owns a tile of one request's query rows and a share of its keys. It reads the keys once,
and uses each tile of them twice: as keys for the scores and as values for the sum.

Legend: s scores, m running maximum, l running sum of exponentials, all in base 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import current_device
from pallas_kernels.merge import merge_partials_triton
from pallas_kernels.paged_decode.tiles import DecodeProblem, DecodeTiles, choose_tiles
from pallas_kernels.precision import precision_for

LOG2_E = math.log2(math.e)
NEG_INF = float("-inf")


def unsupported(problem: DecodeProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    for name, size in (("latent", problem.latent), ("rope", problem.rope)):
        if size & (size - 1) or size < 16:
            return f"{name} is {size}, the Triton lowering needs a power of two from 16"
    if problem.latent > 512:
        return f"latent is {problem.latent}, a tile holds at most 512"
    if problem.page_size & (problem.page_size - 1) or problem.page_size < 16:
        return f"page size is {problem.page_size}, the kernel needs a power of two from 16"
    return None


def _load(ref, index, mask):
    """ref[index], with zeros where `mask` is False; None masks nothing."""
    if mask is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _load_keys(ckv_ref, kpe_ref, ids_ref, first_id, token, keys, in_request):
    """Tokens token..token+keys of a request: latent [keys, C] and rope [keys, R].

    `in_request` masks the tile's tokens beyond the request, whose slots may hold NaN; None means
    that all lie inside.
    """
    num_pages, page_size, _ = ckv_ref.shape
    row_mask = None if in_request is None else in_request[:, None]

    if keys <= page_size:
        page = jnp.clip(ids_ref[first_id + token // page_size], 0, num_pages - 1)
        rows = pl.ds(token % page_size, keys)
        index = (page, rows, slice(None))
        return _load(ckv_ref, index, row_mask), _load(kpe_ref, index, row_mask)

    tokens = token + jnp.arange(keys)
    page = _load(ids_ref, (first_id + tokens // page_size,), in_request)
    page = jnp.clip(page, 0, num_pages - 1)[:, None]
    slot = (tokens % page_size)[:, None]
    ckv = _load(ckv_ref, (page, slot, jnp.arange(ckv_ref.shape[2])[None, :]), row_mask)
    kpe = _load(kpe_ref, (page, slot, jnp.arange(kpe_ref.shape[2])[None, :]), row_mask)
    return ckv, kpe


def _decode_kernel(
    q_nope_ref,  # [rows, C]
    q_pe_ref,  # [rows, R]
    ckv_ref,  # [pages, page, C], in device memory
    kpe_ref,  # [pages, page, R], in device memory
    ids_ref,  # [ids]
    start_ref,  # [B]
    length_ref,  # [B]
    scale_ref,  # [1]
    out_ref,  # [rows, C]
    lse_ref,  # [rows]
    *,
    tiles: DecodeTiles,
    tokens: int,
    heads: int,
):
    row_block, request, split = (pl.program_id(axis) for axis in range(3))
    length = length_ref[request]
    first_id = start_ref[request]
    scale = scale_ref[0] * LOG2_E
    q_nope, q_pe = q_nope_ref[...], q_pe_ref[...]
    dot = functools.partial(plgpu.dot, precision=precision_for(q_nope.dtype))

    # Row r is head r % heads of query token r // heads, and sees the keys before `visible`.
    row = row_block * tiles.rows + jnp.arange(tiles.rows)
    visible = length - tokens + 1 + row // heads

    num_blocks = pl.cdiv(length, tiles.keys)
    share = pl.cdiv(num_blocks, tiles.splits)
    begin = jnp.minimum(split * share, num_blocks)
    end = jnp.minimum(begin + share, num_blocks)
    # Blocks that every row sees whole need no mask.
    unmasked = jnp.clip((length - tokens + 1) // tiles.keys, begin, end)

    def attend(block, carry, masked):
        acc, m, l = carry
        token = block * tiles.keys
        position = token + jnp.arange(tiles.keys)
        in_request = position < length if masked else None
        ckv, kpe = _load_keys(ckv_ref, kpe_ref, ids_ref, first_id, token, tiles.keys, in_request)

        s = (dot(q_nope, ckv, trans_b=True) + dot(q_pe, kpe, trans_b=True)) * scale
        if masked:
            s = jnp.where(position[None, :] < visible[:, None], s, NEG_INF)
        new_m = jnp.maximum(m, jnp.max(s, axis=1))
        # A row that has seen no key yet keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(new_m == NEG_INF, 0.0, new_m)
        p = jnp.exp2(s - shift[:, None])
        keep = jnp.exp2(m - shift)
        acc = acc * keep[:, None] + dot(p.astype(ckv.dtype), ckv)
        return acc, new_m, l * keep + jnp.sum(p, axis=1)

    carry = (
        jnp.zeros((tiles.rows, q_nope.shape[1]), jnp.float32),
        jnp.full((tiles.rows,), NEG_INF, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
    )
    carry = lax.fori_loop(begin, unmasked, functools.partial(attend, masked=False), carry)
    acc, m, l = lax.fori_loop(unmasked, end, functools.partial(attend, masked=True), carry)

    empty = l == 0.0
    out_ref[...] = (acc / jnp.where(empty, 1.0, l)[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, NEG_INF, m + jnp.log2(jnp.where(empty, 1.0, l)))


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
    interpret: bool,
    tiles: DecodeTiles | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Float[Array, "batch tokens heads"]]:
    """`paged_decode` on the Triton lowering; `tiles` overrides the choice, for tuning."""
    batch, tokens, heads, latent = q_nope.shape
    rope = q_pe.shape[-1]
    problem = DecodeProblem.of(q_nope, q_pe, ckv_cache, page_ids)
    tiles = tiles or choose_tiles(problem, current_device(), num_splits)
    row_blocks = pl.cdiv(problem.rows, tiles.rows)
    padded = row_blocks * tiles.rows

    def as_rows(q: Array) -> Array:
        rows = q.reshape(batch, problem.rows, q.shape[-1])
        return jnp.pad(rows, ((0, 0), (0, padded - problem.rows), (0, 0)))

    def tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tiles.rows, width), lambda r, b, s: (b, r, 0))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    out, lse = pl.pallas_call(
        functools.partial(_decode_kernel, tiles=tiles, tokens=tokens, heads=heads),
        grid=(row_blocks, batch, tiles.splits),
        in_specs=[tile(latent), tile(rope), *[whole] * 6],
        out_specs=[
            pl.BlockSpec((None, None, tiles.rows, latent), lambda r, b, s: (s, b, r, 0)),
            pl.BlockSpec((None, None, tiles.rows), lambda r, b, s: (s, b, r)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (tiles.splits, batch, padded, latent),
                q_nope.dtype if tiles.splits == 1 else jnp.float32,
            ),
            jax.ShapeDtypeStruct((tiles.splits, batch, padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_paged_decode",
    )(
        *(as_rows(q_nope), as_rows(q_pe), ckv_cache, kpe_cache, page_ids, start, length),
        sm_scale.reshape(1),
    )
    rows = batch * padded
    out, lse = out.reshape(tiles.splits, rows, latent), lse.reshape(tiles.splits, rows)
    if tiles.splits == 1:
        out, lse = out[0], lse[0]
    else:
        out, lse = merge_partials_triton(out, lse, q_nope.dtype, interpret=interpret)
    out = out.reshape(batch, padded, latent)[:, : problem.rows]
    lse = lse.reshape(batch, padded)[:, : problem.rows]
    return out.reshape(q_nope.shape), lse.reshape(batch, tokens, heads)
