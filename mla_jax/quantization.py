"""FP8 (float8_e4m3fn) with scales: weights, activations and the latent cache.

Source: DeepSeek-V3 (arXiv:2412.19437, 3.3) for weights and activations, DeepSeek-V3.2's FlashMLA
for the cache's rows of 656 bytes.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, UInt8

from pallas_kernels.block_scaled import (
    DEFAULT_BLOCK,
    BlockScaled,
    quantize_groups,
    scale_of,
    spread_scales,
    to_fp8,
)
from pallas_kernels.precision import FP8, GROUP


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


def scales_are_powers_of_two(config: dict[str, Any]) -> bool:
    """Whether a config.json's `quantization_config` wants that of activations' scales (ue8m0).

    Errors: ValueError for another `scale_fmt`, or activations that are not quantised as they come.

    >>> scales_are_powers_of_two({"quantization_config": {"scale_fmt": "ue8m0"}})
    True
    """
    settings = config.get("quantization_config") or {}
    scheme, form = settings.get("activation_scheme") or "dynamic", settings.get("scale_fmt")
    if scheme != "dynamic":
        raise ValueError(f"activation_scheme = {scheme!r} is not supported, expected 'dynamic'")
    if form not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt = {form!r} is not supported, expected 'ue8m0' or none")
    return form is not None


def quantization_config(weight: BlockScaled) -> dict[str, Any]:
    """What a config.json says of such weights: `weight_block_size` and the like read it back.

    >>> settings = quantization_config(BlockScaled.of_shape((8, 8), (4, 2)))
    >>> weight_block_size({"quantization_config": settings})
    (4, 2)
    """
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(weight.block_size),
    }
    return settings | ({"scale_fmt": "ue8m0"} if weight.power_of_two else {})


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
        scale = scale_of(jnp.maximum(*found))
    scale = jnp.asarray(scale, jnp.float32)
    values = [to_fp8(x / scale) for x in pools]
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
