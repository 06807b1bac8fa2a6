"""FP8 (float8_e4m3fn) with scales: weights, activations and the latent cache.

Source: DeepSeek-V3 (arXiv:2412.19437, 3.3) for weights and activations, DeepSeek-V3.2's FlashMLA
for the cache's rows of 656 bytes.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, UInt8

from pallas_kernels.precision import FP8, GROUP

LARGEST = 448.0
"""The greatest e4m3 number: what is beyond it becomes NaN."""
LEAST_AMAX = 1e-4
"""A group whose numbers are smaller than this is scaled as if one were this large."""
DEFAULT_BLOCK = (128, 128)


def weight_block_size(config: dict[str, Any]) -> tuple[int, int]:
    """The (rows, columns) that share a scale, from a config.json's `quantization_config`.

    Errors: ValueError for another method than block-scaled FP8, or a size that is not two positive
    integers.

    >>> weight_block_size({"quantization_config": {"quant_method": "fp8"}})
    (128, 128)
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"quantization_config: got {settings!r}, expected an object")
    method = settings.get("quant_method", "fp8")
    if method != "fp8":
        raise ValueError(f"quant_method = {method!r} is not supported, expected 'fp8'")
    block = settings.get("weight_block_size") or DEFAULT_BLOCK
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"weight_block_size: got {block!r}, expected two positive integers")
    return sizes


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight [*stack, m, n]: one a block, ragged edges included.

    >>> scale_shape((576, 7168), (128, 128))
    (5, 56)
    """
    *stack, m, n = shape
    return (*stack, -(-m // block[0]), -(-n // block[1]))


@partial(jax.jit, static_argnames=("dtype", "block_size"))
def dequantize_blocks(
    weight: Float[Array, "*stack m n"],
    scale_inv: Float[Array, "*stack m_blocks n_blocks"],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    block_size: tuple[int, int] = DEFAULT_BLOCK,
) -> Float[Array, "*stack m n"]:
    """weight[i, j] * scale_inv[i // rows, j // columns], multiplied in float32, then rounded once.

    weight: float8_e4m3fn. scale_inv: float32, what checkpoints call `weight_scale_inv`; despite
    its name it is the multiplier. Sizes need not be multiples of the block. Errors: ValueError if
    there is not one scale a block.

    >>> weight = jnp.ones((2, 3), jnp.float8_e4m3fn)
    >>> dequantize_blocks(weight, jnp.array([[0.5, 2.0]]), jnp.float32, block_size=(2, 2))
    Array([[0.5, 0.5, 2. ],
           [0.5, 0.5, 2. ]], dtype=float32)
    """
    expected = scale_shape(weight.shape, block_size)
    if scale_inv.shape != expected:
        raise ValueError(
            f"scale_inv: got shape {scale_inv.shape}, expected {expected} for a weight "
            f"{weight.shape} in blocks of {block_size}"
        )
    *_, m, n = weight.shape
    rows = jnp.arange(m)[:, None] // block_size[0]
    columns = jnp.arange(n) // block_size[1]
    scales = scale_inv[..., rows, columns].astype(jnp.float32)
    return (weight.astype(jnp.float32) * scales).astype(dtype)


def _scale_of(amax: Float[Array, "*shape"], power_of_two: bool = False) -> Float[Array, "*shape"]:
    scale = jnp.maximum(amax, LEAST_AMAX) / LARGEST
    if power_of_two:
        # The next power of two, by the exponent: a rounded log2 could be off by one.
        fraction, exponent = jnp.frexp(scale)
        scale = jnp.ldexp(jnp.ones_like(scale), jnp.where(fraction == 0.5, exponent - 1, exponent))
    return scale


def _to_fp8(scaled: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(FP8)


def quantize_groups(
    x: Float[Array, "*rows width"], *, power_of_two: bool = False
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows groups"]]:
    """(e4m3 values, float32 scales) of each row's groups of 128 columns: x is values * scales.

    A scale is max(amax, 1e-4) / 448 over its group; power_of_two (ue8m0): the next power of two.
    The last group is what is left of a row. A group with a NaN has NaN as its scale.

    >>> values, scales = quantize_groups(jnp.array([[448.0, 1.0], [0.0, 7.0]]))
    >>> values.astype(jnp.float32).tolist(), scales.tolist()
    ([[448.0, 1.0], [0.0, 448.0]], [[1.0], [0.015625]])
    """
    *rows, width = x.shape
    groups = -(-width // GROUP)
    x = x.astype(jnp.float32)
    padded = jnp.pad(x, [*((0, 0) for _ in rows), (0, groups * GROUP - width)])
    amax = jnp.abs(padded).reshape(*rows, groups, GROUP).max(axis=-1)
    scales = _scale_of(amax, power_of_two)
    return _to_fp8(x / spread_scales(scales, width)), scales


def spread_scales(scales: Float[Array, "*rows groups"], width: int) -> Float[Array, "*rows width"]:
    """The scale of each of `width` columns, whose groups are of 128.

    >>> spread_scales(jnp.array([2.0, 3.0]), 130)[126:].tolist()
    [2.0, 2.0, 3.0, 3.0]
    """
    return jnp.repeat(scales, GROUP, axis=-1)[..., :width]


class QuantizedPool(NamedTuple):
    """A pool of latents in float8_e4m3fn: values * scales, a scale a slot and 128 columns.

    >>> QuantizedPool.zeros(2, 64, 512).scales.shape
    (2, 64, 4)
    """

    values: Float[Array, "pages page latent"]
    scales: Float[Array, "pages page groups"]

    @classmethod
    def zeros(cls, *shape: int, device: Any = None) -> "QuantizedPool":
        *slots, latent = shape
        groups = -(-latent // GROUP)
        return cls(
            values=jnp.zeros(shape, FP8, device=device),
            scales=jnp.zeros((*slots, groups), jnp.float32, device=device),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedLatents:
    """A latent cache of any leading axes, [pages, page] or [tokens], in float8_e4m3fn: a pytree.

    ckv [*slots, latent] is e4m3. Its numbers are multiplied with scales, float32: [*slots, groups],
    one a slot and 128 columns, beside kpe [*slots, rope] as it came; or one number [] for the whole
    cache, kpe being e4m3 under the same scale. These arrays are what `mla_paged_decode` takes as
    ckv_cache, kpe_cache and kv_scales: rows of 512, 16 and 128 bytes, each aligned, 656 a token.
    """

    ckv: Float[Array, "*slots latent"]
    scales: Float[Array, "*slots groups"] | Float[Array, ""]
    kpe: Float[Array, "*slots rope"]

    def packed(self) -> UInt8[Array, "*slots bytes"]:
        """One row of bytes a slot, as DeepSeek-V3.2's FlashMLA keeps it: 656 at its widths.

        512 e4m3 numbers, 4 float32 scales, 64 bfloat16 of kpe, little-endian. Errors: ValueError
        for a cache with one scale, which these rows have no place for.

        >>> cache = quantize_cache(jnp.ones((3, 64, 512)), jnp.ones((3, 64, 64)))
        >>> cache.packed().shape
        (3, 64, 656)
        """
        if self.scales.ndim == 0:
            raise ValueError("scales: got one for the whole cache, expected layout='slot'")
        fields = (self.ckv, self.scales, self.kpe.astype(jnp.bfloat16))
        return jnp.concatenate([_bytes(field) for field in fields], axis=-1)

    @classmethod
    def unpack(cls, rows: Array, *, latent: int = 512) -> "QuantizedLatents":
        """The cache that `packed` made the bytes of; kpe is bfloat16.

        rows: [*slots, bytes], uint8, int8 or float8_e4m3fn (bytes by another name). Errors:
        ValueError for a width that is no row of `latent`, TypeError for a dtype of more than a
        byte.

        >>> cache = quantize_cache(jnp.ones((2, 512)), jnp.ones((2, 64)))
        >>> QuantizedLatents.unpack(cache.packed()).kpe.shape
        (2, 64)
        """
        if rows.dtype.itemsize != 1:
            raise TypeError(f"rows: got dtype {rows.dtype}, expected uint8 or float8_e4m3fn")
        scales_end = latent + 4 * -(-latent // GROUP)
        if rows.shape[-1] < scales_end or (rows.shape[-1] - scales_end) % 2:
            raise ValueError(
                f"rows: got {rows.shape[-1]} bytes in shape {rows.shape}, expected {scales_end} "
                f"and 2 for each rotated column beside a latent of {latent}"
            )
        rows = lax.bitcast_convert_type(rows, jnp.uint8)
        ckv, scales, kpe = jnp.split(rows, [latent, scales_end], axis=-1)
        return cls(
            ckv=lax.bitcast_convert_type(ckv, FP8),
            scales=_from_bytes(scales, jnp.float32),
            kpe=_from_bytes(kpe, jnp.bfloat16),
        )


def _bytes(array: Float[Array, "*slots width"]) -> UInt8[Array, "*slots bytes"]:
    in_bytes = lax.bitcast_convert_type(array, jnp.uint8)
    return in_bytes.reshape(*array.shape[:-1], -1) if in_bytes.ndim > array.ndim else in_bytes


def _from_bytes(rows: UInt8[Array, "*slots bytes"], dtype: DTypeLike) -> Array:
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(rows.reshape(*rows.shape[:-1], -1, size), dtype)


def quantize_cache(
    ckv: Float[Array, "*slots latent"],
    kpe: Float[Array, "*slots rope"],
    *,
    layout: Literal["slot", "tensor"] = "slot",
    scale: float | Float[Array, ""] | None = None,
) -> QuantizedLatents:
    """A latent cache in float8_e4m3fn, of any leading axes: [pages, page], [tokens].

    layout "slot": a float32 scale for each slot and 128 columns of the latent, kpe stays as it is;
    `packed()` makes rows of 656 bytes of it. "tensor": one scale for everything, kpe in e4m3 too,
    576 bytes a token; `scale` gives it (numbers beyond 448 of it saturate), None takes the
    greatest number's. Scales are max(amax, 1e-4) / 448; in the one scale NaN, which unused slots
    may hold, does not count, and a slot with NaN is NaN.
    A number x with scale s comes back within max(|x| / 16, s / 1024). Errors: ValueError for
    leading axes that differ, or a `scale` for layout "slot".

    >>> cache = quantize_cache(jnp.ones((3, 64, 512)), jnp.ones((3, 64, 64)))
    >>> cache.ckv.dtype, cache.scales.shape
    (dtype(float8_e4m3fn), (3, 64, 4))
    """
    if ckv.shape[:-1] != kpe.shape[:-1]:
        raise ValueError(
            f"kpe: got shape {kpe.shape}, expected ckv's {ckv.shape} but for the last axis"
        )
    if layout not in ("slot", "tensor"):
        raise ValueError(f"layout: got {layout!r}, expected 'slot' or 'tensor'")
    if layout == "slot":
        if scale is not None:
            raise ValueError("scale: got a value, expected None for layout 'slot'")
        values, scales = quantize_groups(ckv)
        return QuantizedLatents(ckv=values, scales=scales, kpe=kpe)
    pools = [pool.astype(jnp.float32) for pool in (ckv, kpe)]
    if scale is None:
        found = [jnp.where(jnp.isnan(x), 0, jnp.abs(x)).max(initial=0) for x in pools]
        scale = _scale_of(jnp.maximum(*found))
    scale = jnp.asarray(scale, jnp.float32)
    values = [_to_fp8(x / scale) for x in pools]
    return QuantizedLatents(ckv=values[0], scales=scale, kpe=values[1])


def dequantize_cache(
    cache: QuantizedLatents | UInt8[Array, "*slots bytes"], dtype: DTypeLike = jnp.bfloat16
) -> tuple[Float[Array, "*slots latent"], Float[Array, "*slots rope"]]:
    """(ckv, kpe) of `quantize_cache`'s result, or of rows of 656 bytes, in `dtype`.

    Products are made in float32 and rounded once. Errors: `QuantizedLatents.unpack`'s.

    >>> cache = quantize_cache(jnp.full((5, 512), 3.0), jnp.ones((5, 64)))
    >>> ckv, kpe = dequantize_cache(cache.packed())
    >>> ckv.shape, kpe.shape, ckv[0, 0].item()
    ((5, 512), (5, 64), 3.0)
    """
    if not isinstance(cache, QuantizedLatents):
        cache = QuantizedLatents.unpack(cache)
    ckv, kpe = (pool.astype(jnp.float32) for pool in (cache.ckv, cache.kpe))
    if cache.scales.ndim == 0:
        ckv, kpe = ckv * cache.scales, kpe * cache.scales
    else:
        ckv = ckv * spread_scales(cache.scales, ckv.shape[-1])
    return ckv.astype(dtype), kpe.astype(dtype)
