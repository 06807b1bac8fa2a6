"""`quantize_cache` and its rows of bytes, against NumPy in float64 with an e4m3 of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantization import decode_e4m3

from mla_jax import QuantizedLatents, dequantize_cache, quantize_cache
from mla_jax.quantization import quantize_groups

E4M3 = np.sort(decode_e4m3(np.arange(127)))
"""All e4m3 numbers that are not negative."""


def nearest_e4m3(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The e4m3 numbers on either side of |x|: rounding gives one of them, the nearer one."""
    above = np.searchsorted(E4M3, np.abs(x)).clip(0, len(E4M3) - 1)
    return E4M3[np.maximum(above - 1, 0)], E4M3[above]


def group_scales(x: np.ndarray) -> np.ndarray:
    """max(amax, 1e-4) / 448 of each row's groups of 128 columns, by the contract."""
    groups = [x[..., i : i + 128] for i in range(0, x.shape[-1], 128)]
    amax = np.stack([np.abs(group).max(axis=-1) for group in groups], axis=-1)
    return np.maximum(amax, 1e-4) / 448


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers whose size differs from row to row and group to group, zeros among them."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 6, (*shape[:-1], 1))
    x *= np.repeat(2.0 ** rng.integers(-4, 5, (*shape[:-1], -(-shape[-1] // 128))), 128, -1)[
        ..., : shape[-1]
    ]
    x[rng.random(shape) < 0.05] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 4, 512), (5, 64), (2, 200), (0, 512)])
def test_each_group_has_its_scale(rng, shape):
    x = draw(rng, *shape)
    values, scales = quantize_groups(jnp.asarray(x))
    want = group_scales(x.astype(np.float64))
    np.testing.assert_allclose(scales, want, rtol=3e-7)
    codes = decode_e4m3(np.asarray(values).view(np.uint8))
    exact = (
        x.astype(np.float64) / np.repeat(np.asarray(scales, np.float64), 128, -1)[..., : shape[-1]]
    )
    below, above = nearest_e4m3(exact)
    least = np.minimum(np.abs(exact) - below, above - np.abs(exact))
    np.testing.assert_array_less(np.abs(np.abs(codes) - np.abs(exact)), np.abs(least) + 1e-4)
    assert (codes * exact >= 0).all()
    # The largest number of a group that is not tiny becomes e4m3's largest.
    for group in range(want.shape[-1]):
        largest = np.abs(codes[..., 128 * group : 128 * (group + 1)]).max(axis=-1)
        np.testing.assert_array_equal(largest == 448, want[..., group] * 448 > 1e-4)


def test_scales_that_are_powers_of_two(rng):
    """2^ceil(log2 s); an exact power stays what it is."""
    exact = 448 * 2.0 ** np.arange(-12, 12, dtype=np.float32)[:, None]
    for x in (exact, np.nextafter(exact, np.float32(np.inf)), draw(rng, 40, 300)):
        _, scales = quantize_groups(jnp.asarray(x), power_of_two=True)
        want = group_scales(x.astype(np.float64))
        fractions, _ = np.frexp(np.asarray(scales))
        np.testing.assert_array_equal(fractions, 0.5)
        assert (scales >= want * (1 - 1e-7)).all()
        assert (scales < 2 * want * (1 + 1e-7)).all()
    _, scales = quantize_groups(jnp.asarray(exact), power_of_two=True)
    np.testing.assert_array_equal(scales, exact / 448)


@pytest.mark.parametrize("layout", ["slot", "tensor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(rng, layout, dtype):
    """Within max(|x| / 16, s / 1024), and a rounding of the result to its dtype."""
    ckv, kpe = (jnp.asarray(draw(rng, 6, 16, width), dtype) for width in (512, 64))
    cache = jax.jit(quantize_cache, static_argnames="layout")(ckv, kpe, layout=layout)
    assert cache.ckv.dtype == jnp.float8_e4m3fn
    assert cache.scales.dtype == jnp.float32
    assert cache.scales.shape == ((6, 16, 4) if layout == "slot" else ())
    back = dequantize_cache(cache, dtype)
    x = [np.asarray(pool).astype(np.float64) for pool in (ckv, kpe)]
    if layout == "slot":
        np.testing.assert_array_equal(back[1], kpe)
        checked = [(back[0], x[0], np.repeat(group_scales(x[0]), 128, -1))]
    else:
        scale = max(np.abs(pool).max() for pool in x) / 448
        checked = [(got, want, scale) for got, want in zip(back, x, strict=True)]
    for got, want, scale in checked:
        assert got.dtype == dtype
        bound = np.maximum(np.abs(want) / 16, scale / 1024) * (1 + 1e-5)
        bound += np.abs(want) * (2.0**-8 if dtype == "bfloat16" else 1e-6)
        assert (np.abs(np.asarray(got).astype(np.float64) - want) <= bound).all()


def test_a_given_scale_saturates(rng):
    ckv, kpe = draw(rng, 8, 512), draw(rng, 8, 64)
    scale = float(np.abs(ckv).max()) / 448 / 4
    cache = quantize_cache(jnp.asarray(ckv), jnp.asarray(kpe), layout="tensor", scale=scale)
    assert float(cache.scales) == np.float32(scale)
    got, _ = dequantize_cache(cache, jnp.float32)
    want = np.clip(ckv, -448 * scale, 448 * scale)
    assert (np.abs(want) < np.abs(ckv)).any()
    np.testing.assert_allclose(got, want, rtol=1 / 16 + 1e-5, atol=scale / 1024)


@pytest.mark.parametrize("layout", ["slot", "tensor"])
def test_unused_slots_may_hold_nan(rng, layout):
    ckv, kpe = draw(rng, 4, 3, 256), draw(rng, 4, 3, 32)
    want = dequantize_cache(quantize_cache(jnp.asarray(ckv), jnp.asarray(kpe), layout=layout))
    unused = np.abs(ckv).max(axis=(1, 2)) < np.abs(ckv).max()  # not the page of the largest number
    if layout == "tensor":
        unused &= np.abs(kpe).max(axis=(1, 2)) < np.abs(kpe).max()
    assert unused.any()
    ckv[unused], kpe[unused] = np.nan, np.nan
    got = dequantize_cache(quantize_cache(jnp.asarray(ckv), jnp.asarray(kpe), layout=layout))
    for pool, before in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[~unused], np.asarray(before)[~unused])
        assert np.isnan(np.asarray(pool, np.float32)[unused]).all()


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (64, 16), (200, 3)])
def test_packed_rows(rng, latent, rope):
    """Field by field, as bytes, and back to the same bits."""
    ckv, kpe = (jnp.asarray(draw(rng, 3, 4, width)) for width in (latent, rope))
    cache = quantize_cache(ckv, kpe)
    rows = np.asarray(cache.packed())
    groups = -(-latent // 128)
    assert rows.dtype == np.uint8
    assert rows.shape == (3, 4, latent + 4 * groups + 2 * rope)
    ends = latent, latent + 4 * groups
    fields = [np.ascontiguousarray(field) for field in np.split(rows, ends, axis=-1)]
    np.testing.assert_array_equal(fields[0], np.asarray(cache.ckv).view(np.uint8))
    np.testing.assert_array_equal(fields[1].view("<f4"), cache.scales)
    np.testing.assert_array_equal(
        fields[2].view("<u2"), np.asarray(kpe.astype("bfloat16")).view("<u2")
    )
    for view in (np.uint8, np.int8, jnp.float8_e4m3fn):
        back = QuantizedLatents.unpack(jnp.asarray(rows.view(view)), latent=latent)
        for name in ("ckv", "scales"):
            got, want = getattr(back, name), getattr(cache, name)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    if latent == 512:
        assert rows.shape[-1] == 656
        for got, want in zip(
            dequantize_cache(jnp.asarray(rows)), dequantize_cache(cache), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_errors():
    ckv, kpe = jnp.ones((2, 512)), jnp.ones((2, 64))
    with pytest.raises(ValueError, match=r"kpe: got shape \(3, 64\), expected ckv's \(2, 512\)"):
        quantize_cache(ckv, jnp.ones((3, 64)))
    with pytest.raises(ValueError, match="layout: got 'row', expected 'slot' or 'tensor'"):
        quantize_cache(ckv, kpe, layout="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="scale: got a value, expected None"):
        quantize_cache(ckv, kpe, scale=1.0)
    with pytest.raises(ValueError, match="scales: got one for the whole cache"):
        quantize_cache(ckv, kpe, layout="tensor").packed()
    with pytest.raises(TypeError, match="rows: got dtype int16"):
        QuantizedLatents.unpack(jnp.zeros((2, 656), jnp.int16))
    with pytest.raises(ValueError, match=r"rows: got 657 bytes .* expected 528 and 2 for each"):
        QuantizedLatents.unpack(jnp.zeros((2, 657), jnp.uint8))
    with pytest.raises(ValueError, match="rows: got 500 bytes"):
        dequantize_cache(jnp.zeros((2, 500), jnp.uint8))
