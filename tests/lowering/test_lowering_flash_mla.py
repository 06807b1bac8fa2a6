"""The kernels behind FlashMLA's functions lower for an H200 on a machine without a GPU."""

import itertools

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from lowered import kernels

from mla_jax import flash_mla
from pallas_kernels.causal_prefill.tiles import SHARED_BYTES, CausalTiles
from pallas_kernels.device import current_device
from pallas_kernels.grouped_attention.blocks import compute_dtype
from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.grouped_decode.tiles import choose_tiles as decode_tiles
from pallas_kernels.grouped_decode.tiles import problem_of
from pallas_kernels.grouped_decode.triton import grouped_decode_triton
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.sparse_prefill import SparseProblem
from pallas_kernels.sparse_prefill.tiles import choose_tiles as prefill_tiles
from pallas_kernels.sparse_prefill.triton import sparse_prefill_triton

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
WIDTHS = (64, 128, 192, 256)
DECODE = ["mla_grouped_decode", "mla_paged_merge"]
PREFILL = ["mla_sparse_prefill"]
BATCH, BLOCKS = 4, 64
SCALE = Shape((), jnp.float32)


def ints(*shape: int) -> Shape:
    return Shape(shape, jnp.int32)


def decode_shapes(width: int, dtype: str, heads=(32, 8)):
    cache = Shape((BATCH, heads[1], BLOCKS, 64, width), dtype)
    return Shape((BATCH, heads[0], 1, width), dtype), cache, cache


def prefill_shapes(width: int, dtype: str, heads=(32, 8), tokens=1000):
    q, k = (Shape((BATCH, n, tokens, width), dtype) for n in heads)
    return q, k, k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_decode(width, dtype):
    """Nobody names Triton here: on a GPU it is what a call gets."""
    requests = ints(BATCH, BLOCKS), ints(BATCH)
    masks = (None, Shape((BATCH, 1, 1, 4096), jnp.bool_), Shape((BATCH, 32, 1, 4096), jnp.float32))
    for mask in masks:
        args = *decode_shapes(width, dtype), *requests, mask
        assert kernels(flash_mla.flash_mla_with_kvcache, *args) == DECODE


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (24, 1), (128, 1), (96, 8)])
def test_decode_heads(heads):
    args = *decode_shapes(128, "bfloat16", heads), ints(BATCH, BLOCKS), ints(BATCH)
    assert kernels(flash_mla.flash_mla_with_kvcache, *args) == DECODE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_prefill(width, dtype):
    layouts = (None, (16, 16), (BATCH, 16, 16), (BATCH, 1, 16, 16), (BATCH, 32, 16, 16))
    masks = (None, jnp.bool_, jnp.float32)
    for layout, mask in zip(layouts, itertools.cycle(masks), strict=False):
        args = (
            *prefill_shapes(width, dtype),
            None if layout is None else Shape(layout, jnp.bool_),
            None if mask is None else Shape((BATCH, 1, 1000, 1024), mask),
        )
        assert kernels(flash_mla.flash_mla_prefill, *args) == PREFILL


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_paged_prefill(width, dtype):
    q, k, v = prefill_shapes(width, dtype, heads=(8, 8))
    cache = Shape((BATCH, 8, BLOCKS, 64, width), dtype)

    def write(q, k_cache, v_cache, table, k, v):
        return flash_mla.mha_fwd_kvcache(q, k_cache, v_cache, table, k_new=k, v_new=v)

    args = q, cache, cache, ints(BATCH, BLOCKS)
    assert kernels(flash_mla.mha_fwd_kvcache, *args) == PREFILL
    assert kernels(write, *args, k, v) == PREFILL


@pytest.mark.parametrize(("tokens", "causal"), [(1, False), (2, True), (2, False), (40, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_pool(dtype, tokens, causal):
    """The real library's form runs on the paged latent kernels."""

    def call(q, pool, table, lengths):
        return flash_mla.flash_mla_with_kvcache(
            q, pool, block_table=table, seq_lens=lengths, causal=causal, backend="triton"
        )

    pool = Shape((100, 64, 1, 576), dtype)
    q = Shape((BATCH, tokens, 16, 576), dtype)
    found = kernels(call, q, pool, ints(BATCH, 8), ints(BATCH))
    assert found == ["mla_paged_attention", "mla_paged_merge"]


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("keys", [16, 32, 64])
@pytest.mark.parametrize("mask_all", [False, True])
def test_decode_tiles(rows, keys, mask_all):
    """Those that a sweep tries."""
    tiles = PagedTiles(
        rows=rows, keys=keys, num_warps=4, num_stages=3, blocks_per_core=2, mask_all=mask_all
    )

    def call(*args):
        return grouped_decode_triton(
            *args, num_splits=None, deterministic=False, interpret=False, tiles=tiles
        )

    q, k, v = decode_shapes(128, "bfloat16")
    args = Shape((BATCH, 32, 128), q.dtype), k, v, ints(BATCH, BLOCKS), ints(BATCH), None, SCALE
    assert kernels(call, *args) == DECODE


@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize(("rows", "keys"), [(32, 32), (64, 32), (64, 64), (128, 64), (128, 32)])
def test_prefill_tiles(rows, keys, num_warps):
    tiles = CausalTiles(rows=rows, keys=keys, num_warps=num_warps, num_stages=2)
    layout = None if rows > 64 else Shape((1, 1, 16, 16), jnp.bool_)

    def call(q, k, v, layout, scale):
        return sparse_prefill_triton(
            *(q, k, v, layout, None, None, scale), causal=True, interpret=False, tiles=tiles
        )

    assert kernels(call, *prefill_shapes(128, "bfloat16"), layout, SCALE) == PREFILL


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("deterministic", [False, True])
def test_decode_splits(num_splits, deterministic):
    def call(*args):
        return grouped_decode(
            *args, sm_scale=0.1, num_splits=num_splits, deterministic=deterministic
        )

    q, k, v = decode_shapes(192, "bfloat16")
    args = Shape((BATCH, 32, 192), q.dtype), k, v, ints(BATCH, BLOCKS), ints(BATCH)
    assert kernels(call, *args) == (DECODE[:1] if num_splits == 1 else DECODE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_chosen_tiles_fit(width, dtype):
    """What the blocks hold and stream fits a core's shared memory."""
    device, itemsize = current_device(), jnp.dtype(compute_dtype(dtype)).itemsize

    def held(tiles: PagedTiles | CausalTiles, mask_bytes: int) -> int:
        streamed = 2 * tiles.keys * width * itemsize + tiles.rows * tiles.keys * mask_bytes
        return tiles.rows * width * itemsize + tiles.num_stages * streamed

    for heads, mask_bytes in itertools.product(((32, 8), (64, 1)), (0, 1, 4)):
        q = jnp.zeros((1, heads[0], width), dtype)
        cache = jnp.zeros((1, heads[1], 1, 64, width), dtype)
        tiles = decode_tiles(problem_of(q, cache), device, mask_bytes)
        assert tiles.blocks_per_core * held(tiles, mask_bytes) <= SHARED_BYTES
    for layout, mask_bytes in itertools.product((None, (1, 1)), (0, 1, 4)):
        problem = SparseProblem(
            batch=1,
            heads=8,
            kv_heads=8,
            tokens=4096,
            width=width,
            dtype=dtype,
            causal=True,
            paged=False,
            layout=layout,
            mask=(1, 1) if mask_bytes else None,
            mask_bytes=mask_bytes,
        )
        assert held(prefill_tiles(problem, device), mask_bytes) <= SHARED_BYTES
