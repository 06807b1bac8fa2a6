"""An e4m3 cache whose keys the Mosaic GPU kernel's consumers unpack themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_pages import make_fp8
from interpreted import needs_mosaic_gpu, no_races
from oracles import assert_within, float64
from paged_decode_suite import LSE, OUT

from pallas_kernels.paged_attention import mosaic_unpack as unpack
from pallas_kernels.paged_attention.mosaic_packed import pack_queries
from pallas_kernels.paged_decode import mosaic_gpu

SM_SCALE = 0.05
LENGTHS = (0, 1, 64, 650)
"""Empty, one token, a tile's edge, and a ring of four tiles that goes round in either half."""


def run(fp8, **options):
    def decode(scales, *args):
        given = {"sm_scale": jnp.float32(SM_SCALE), "kv_scales": scales, "deterministic": False}
        return mosaic_gpu.paged_decode_mosaic(*args, **given, **options)

    with no_races():
        return jax.jit(decode)(fp8.kv_scales, *fp8.case.args)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("kind", "dtype", "sizes"),
    [
        # Turns.
        ("slot", "bfloat16", {"heads": 3, "tokens": 2, "page_size": 16, "latent": 512}),
        ("tensor_kpe", "bfloat16", {"heads": 16, "page_size": 128, "latent": 256}),
        ("slot", "float16", {"heads": 1, "page_size": 8, "latent": 512, "rope": 0}),
        ("one", "bfloat16", {"heads": 1, "page_size": 32, "latent": 128, "rope": 0}),
        # Rows.
        ("slot", "bfloat16", {"heads": 9, "tokens": 3, "page_size": 64, "latent": 256}),
        ("tensor", "float16", {"heads": 20, "page_size": 64, "latent": 384}),
        ("tensor_kpe", "float16", {"heads": 17, "page_size": 16, "latent": 128}),
    ],
    ids=str,
)
def test_paged(rng, kind, dtype, sizes):
    """Split and not, against the numbers that the cache stands for: nothing is rounded."""
    fp8 = make_fp8(rng, kind, lengths=LENGTHS, dtype=dtype, **{"rope": 64, **sizes})
    out, lse = run(fp8, num_splits=2, interpret=True)
    want_out, want_lse = fp8.want(SM_SCALE)
    assert_within(out, want_out, OUT[dtype])
    assert_within(lse, want_lse, LSE)


@needs_mosaic_gpu
@pytest.mark.parametrize(("heads", "tokens"), [(64, 1), (35, 2)])
def test_rows_of_whole_blocks(rng, heads, tokens):
    """One block of 64 rows, and two."""
    sizes = {"heads": heads, "tokens": tokens, "page_size": 64, "latent": 256, "rope": 64}
    fp8 = make_fp8(rng, "slot", lengths=(0, 130), dtype="bfloat16", **sizes)
    tiles = mosaic_gpu.MosaicTiles(cluster=1, order="rows")
    out, lse = run(fp8, num_splits=None, interpret=True, tiles=tiles)
    want_out, want_lse = fp8.want(SM_SCALE)
    assert_within(out, want_out, OUT["bfloat16"])
    assert_within(lse, want_lse, LSE)


@needs_mosaic_gpu
@pytest.mark.parametrize("order", ["turns", "rows"])
@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
def test_latents_of_any_size(rng, order, scale):
    """Scales and queries beyond float16, and keys whose scales differ 2**20 times."""
    sizes = {"heads": 4, "page_size": 64, "latent": 128, "rope": 0, "dtype": "bfloat16"}
    fp8 = make_fp8(rng, "slot", lengths=(5, 200), **sizes)
    assert fp8.kv_scales is not None
    factor = scale * 2.0 ** rng.integers(-10, 11, fp8.kv_scales.shape)
    q = fp8.case.q_nope.astype(jnp.float32) / factor.max()
    case = dataclasses.replace(fp8.case, q_nope=q.astype(jnp.bfloat16))
    keys = float64(fp8.exact.ckv_cache) * factor
    exact = dataclasses.replace(fp8.exact, q_nope=case.q_nope, ckv_cache=keys)  # pyright: ignore[reportArgumentType]
    scales = fp8.kv_scales * jnp.float32(factor)
    fp8 = dataclasses.replace(fp8, case=case, kv_scales=scales, exact=exact)
    tiles = mosaic_gpu.MosaicTiles(cluster=1, order=order)
    out, lse = run(fp8, num_splits=1, interpret=True, tiles=tiles)
    want_out, want_lse = fp8.want(SM_SCALE)
    assert_within(jnp.float32(out) / factor.max(), want_out / factor.max(), OUT["bfloat16"])
    assert_within(lse, want_lse, LSE)


def test_queries_are_scaled_by_powers_of_two(rng):
    """float16 holds what bfloat16 has, unless it is 2**-24 of its row's greatest."""
    size = 2.0 ** rng.integers(-60, 60, (7, 1))
    q = jnp.asarray(rng.standard_normal((7, 192)) * size, jnp.bfloat16)
    q = q.at[3].set(0)
    nope, turned, factor = pack_queries(
        q[:, :128], q[:, 128:], jnp.float32(0.25), rope_packed=False
    )
    assert (nope.dtype, turned.dtype) == (unpack.OPERAND, jnp.bfloat16)
    together = np.concatenate([float64(nope), float64(unpack.in_row_order(turned))], axis=-1)
    got = together * float64(factor)[:, None]
    want = float64(unpack.in_row_order(q)) * 0.25
    assert np.isfinite(together).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-37 * np.abs(want).max())
    near = np.abs(want) > 2.0**-24 * np.abs(want).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(got[near], want[near])


def test_orders_are_permutations(rng):
    x, places = jnp.asarray(rng.permutation(96)).reshape(32, 3), jnp.arange(32)
    np.testing.assert_array_equal(unpack.in_memory_order(unpack.in_column_order(x)), x)
    # A lane has four neighbouring columns, the first two of which stand in front.
    np.testing.assert_array_equal(
        unpack.in_row_order(places)[:10], [0, 1, 4, 5, 8, 9, 12, 13, 2, 3]
    )
    # Two neighbouring latents stand eight rows apart.
    np.testing.assert_array_equal(
        unpack.in_column_order(places)[jnp.array([0, 8, 1, 9, 16, 24])], [0, 1, 2, 3, 16, 17]
    )
