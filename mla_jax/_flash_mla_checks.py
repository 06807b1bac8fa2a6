"""What FlashMLA's functions accept: each check names the argument, what came, and the fix.

Arrays may be JAX's, NumPy's or torch's: shapes, dtypes and strides are read as each of them shows
these, without importing torch. Values are looked at where they are concrete, not under a trace.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.checks import FLOATS
from pallas_kernels.grouped_attention.blocks import BLOCK, DTYPES
from pallas_kernels.precision import FP8, GROUP

Shape = tuple[int, ...]

FIX_HEADS = "Adjust q reshape or head-splitting for MLA"
FIX_BLOCKS = "Update block_table or cache allocation"
FIX_STRIDES = "Call .contiguous() or re-pack before kernel call"
FIX_MASK = "Pad mask or recompute with correct seq length"
FIX_LENGTHS = "Grow cache or truncate sequence"
FIX_DTYPES = "Cast consistently to FP8/BF16/FP16"


def dtype_name(array: Any) -> str:
    """The same for torch's as for NumPy's arrays: bfloat16."""
    return str(array.dtype).removeprefix("torch.")


def is_integer(array: Any) -> bool:
    return dtype_name(array).startswith(("int", "uint"))


def to_jax(array: Any) -> jax.Array:
    """A JAX array of any of the three kinds; integers as int32."""
    if not isinstance(array, jax.Array):
        if isinstance(array, np.ndarray):
            return jnp.asarray(array, jnp.int32 if is_integer(array) else array.dtype)
        contiguous = getattr(array, "contiguous", None)
        array = jnp.from_dlpack(contiguous() if contiguous else array)
    return array.astype(jnp.int32) if is_integer(array) else array


def with_shape(array: Any) -> Any:
    """A list of numbers as an array."""
    return np.asarray(array) if isinstance(array, list | tuple) else array


def values_of(*arrays: Any) -> list[np.ndarray] | None:
    """The arrays' values, or None if any is traced."""
    if any(isinstance(array, Tracer) for array in arrays):
        return None
    return [np.asarray(x if isinstance(x, np.ndarray) else to_jax(x)) for x in arrays]


def _strides(array: Any) -> Shape | None:
    """Strides in elements; None for an array that has none to show, as JAX's."""
    if isinstance(array, jax.Array):
        return None
    if hasattr(array, "stride"):
        return tuple(array.stride())
    strides = getattr(array, "strides", None)
    return None if strides is None else tuple(s // array.dtype.itemsize for s in strides)


def check_strides(name: str, array: Any, inner: int) -> None:
    """ValueError unless the last `inner` dims are contiguous and the others positive and falling.

    Dims of one element have any stride.
    """
    strides = _strides(array)
    if strides is None:
        return
    shape = tuple(array.shape)
    steps = [(axis, stride) for axis, stride in enumerate(strides) if shape[axis] > 1]
    lead = len(shape) - inner
    compact = all(stride == math.prod(shape[axis + 1 :]) for axis, stride in steps if axis >= lead)
    falling = all(a >= b for (_, a), (_, b) in itertools.pairwise(steps))
    if not compact or not falling or any(stride <= 0 for _, stride in steps):
        raise ValueError(
            f"{name}: got strides {strides} for shape {shape}, expected contiguous last {inner} "
            f"dims and positive, non-increasing strides before. {FIX_STRIDES}"
        )


def check_dtypes(arrays: Mapping[str, Any]) -> None:
    """TypeError for a dtype that no kernel takes, or one unlike the first array's."""
    first = next(iter(arrays))
    want = dtype_name(arrays[first])
    if want not in DTYPES:
        raise TypeError(
            f"{first}: got dtype {want}, expected one of {', '.join(DTYPES)}. {FIX_DTYPES}"
        )
    for name, array in arrays.items():
        if dtype_name(array) != want:
            raise TypeError(
                f"{name}: got dtype {dtype_name(array)} beside {first}'s {want}, "
                f"expected the same. {FIX_DTYPES}"
            )


def check_integers(arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        if not is_integer(array):
            raise TypeError(f"{name}: got dtype {dtype_name(array)}, expected integers")


def check_rank(name: str, shape: Shape, axes: str) -> None:
    """ValueError unless `shape` has as many axes as "[a, b, c]" names, none empty."""
    if len(shape) != axes.count(",") + 1 or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}, expected {axes}, none empty")


def check_heads(q_shape: Shape, q_heads: int, name: str, shape: Shape, kv_heads: int) -> None:
    """ValueError unless query heads split evenly among key heads."""
    if q_heads % kv_heads:
        raise ValueError(
            f"q: got {q_heads} heads in shape {q_shape}, expected a multiple of the {kv_heads} in "
            f"{name}'s shape {shape}. {FIX_HEADS}"
        )


def check_like(name: str, shape: Shape, want: Shape, other: str, other_shape: Shape) -> None:
    """ValueError unless `shape` is what the other argument's shape asks for."""
    if shape != want:
        raise ValueError(
            f"{name}: got shape {shape}, expected {want} beside {other}'s shape {other_shape}"
        )


def check_table(table: Shape, want: Shape, cache_shape: Shape) -> None:
    """ValueError unless the table has a row a request and a column a block."""
    if table != want:
        raise ValueError(
            f"block_table: got shape {table}, expected {want} beside k_cache's shape "
            f"{cache_shape}. {FIX_BLOCKS}"
        )


def check_block_size(name: str, shape: Shape, block: int) -> None:
    if block != BLOCK:
        raise ValueError(
            f"{name}: got blocks of {block} in shape {shape}, expected {BLOCK}. {FIX_BLOCKS}"
        )


def check_lengths(lengths: Any, batch: int, capacity: int, table: Shape) -> None:
    """ValueError for lengths of another shape, below 0, or beyond the table's blocks."""
    if tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"seq_lens: got shape {tuple(lengths.shape)}, expected {(batch,)}, one a request"
        )
    if (found := values_of(lengths)) and not ((found[0] >= 0) & (found[0] <= capacity)).all():
        raise ValueError(
            f"seq_lens: got {found[0].min()} to {found[0].max()}, expected 0 to {capacity}, "
            f"{BLOCK} tokens for each block of block_table's shape {table}. {FIX_LENGTHS}"
        )


def check_block_ids(table: Any, lengths: Any, num_blocks: int, *, unique: bool = False) -> None:
    """ValueError for a used id that no block has, or, if `unique`, that a row has twice."""
    found = values_of(table, lengths)
    if found is None:
        return
    ids, counts = found[0], -(-found[1] // BLOCK)
    used = np.arange(ids.shape[1]) < counts[:, None]
    bad = used & ((ids < 0) | (ids >= num_blocks))
    if bad.any():
        b, j = np.argwhere(bad)[0]
        raise ValueError(
            f"block_table: got block id {ids[b, j]} at [{b}, {j}] in shape {ids.shape}, expected 0 "
            f"to {num_blocks - 1}. {FIX_BLOCKS}"
        )
    for b, row in enumerate(ids) if unique else ():
        mine = row[used[b]]
        if len(np.unique(mine)) < len(mine):
            raise ValueError(
                f"block_table: got a block id twice in row {b} of shape {ids.shape}, expected "
                f"distinct blocks to write to. {FIX_BLOCKS}"
            )


def check_mask(name: str, mask: Any, leading: list[Shape], least: int, why: str) -> None:
    """ValueError unless the mask is [*leading, keys] with at least `least` keys."""
    shape = tuple(mask.shape)
    if dtype_name(mask) != "bool" and not dtype_name(mask).startswith(("float", "bfloat")):
        raise TypeError(f"{name}: got dtype {dtype_name(mask)}, expected bool or a floating dtype")
    if shape[:-1] not in leading:
        raise ValueError(
            f"{name}: got shape {shape}, expected {' or '.join(map(str, leading))} and keys"
        )
    if shape[-1] < least:
        raise ValueError(
            f"{name}: got a last dim of {shape[-1]} in shape {shape}, expected at least {least}, "
            f"{why}. {FIX_MASK}"
        )


def check_shapes(q: Shape, kv: Shape, table: Shape) -> None:
    """A decode call's q, cache and table fit together; a cache of four dims is a shared pool."""
    if len(kv) != 4:
        check_rank("q", q, "[batch, heads, 1, width]")
        if q[2] != 1:
            raise ValueError(
                f"q: got {q[2]} tokens in shape {q}, expected [batch, heads, 1, width]"
            )
        return check_cache_shape(q, kv, table)
    check_rank("q", q, "[batch, tokens, heads, width]")
    check_rank("k_cache", kv, f"[num_blocks, {BLOCK}, kv_heads, width]")
    check_block_size("k_cache", kv, kv[1])
    check_like("k_cache", kv, (*kv[:3], q[3]), "q", q)
    check_heads(q, q[2], "k_cache", kv, kv[2])
    check_rank("block_table", table, "[batch, blocks]")
    check_table(table, (q[0], table[1]), kv)


def check_cache_shape(q: Shape, kv: Shape, table: Shape) -> None:
    """q [B, Hq, any, D], and a cache of blocks of each request's own."""
    check_rank("k_cache", kv, f"[batch, kv_heads, blocks, {BLOCK}, width]")
    check_block_size("k_cache", kv, kv[3])
    check_like("k_cache", kv, (q[0], *kv[1:4], q[3]), "q", q)
    check_heads(q, q[1], "k_cache", kv, kv[1])
    check_table(table, (kv[0], kv[2]), kv)


def check_caches(q: Any, caches: Mapping[str, Any], block_table: Any) -> None:
    """Of arrays that fit k_cache: that both caches are alike, strides and dtypes."""
    k_shape = tuple(caches["k_cache"].shape)
    for name, cache in caches.items():
        shape = tuple(cache.shape)
        if shape != k_shape:
            raise ValueError(
                f"{name}: got shape {shape}, expected k_cache's {k_shape}. {FIX_BLOCKS}"
            )
        check_strides(name, cache, 2)
    for name, array in (("q", q), ("block_table", block_table)):
        check_strides(name, array, len(array.shape))
    check_dtypes({"q": q, **caches})
    check_integers({"block_table": block_table})


def check_requests(q: Shape, kv: Shape, block_table: Any, seq_lens: Any) -> None:
    """A decode call's lengths and used block ids."""
    table = tuple(block_table.shape)
    check_strides("block_table", block_table, 2)
    check_integers({"block_table": block_table, "seq_lens": seq_lens})
    check_lengths(seq_lens, q[0], table[1] * BLOCK, table)
    check_block_ids(block_table, seq_lens, kv[0] if len(kv) == 4 else kv[2])


def check_decode_mask(mask: Any, q: Shape, seq_lens: Any) -> None:
    """A mask [B, 1 or Hq, 1, keys] that reaches the longest length."""
    lengths = values_of(seq_lens)
    longest = 0 if lengths is None else int(lengths[0].max())
    leading = [(q[0], 1, 1), (q[0], q[1], 1)]
    check_mask("mask", mask, leading, longest, "the longest of seq_lens")


def check_prefill_mask(mask: Any, q: Shape) -> None:
    """A mask [B, 1 or Hq, P, P], or with more rows and keys."""
    rows = max(q[2], mask.shape[-2] if len(mask.shape) > 1 else 0)
    leading = [(q[0], 1, rows), (q[0], q[1], rows)]
    check_mask("attn_mask", mask, leading, q[2], f"the tokens of q's shape {q}")


class Descales(NamedTuple):
    """What q's and the cache's e4m3 numbers are multiplied with."""

    q: Any
    k: jax.Array | None


def descales(
    q: Any, v_cache: Any, is_fp8_kvcache: bool, descale_q: Any, descale_k: Any
) -> Descales:
    """The two numbers, 1 or None where none came; ValueError where the call has no use for one."""
    found = {}
    for name, value in (("descale_q", descale_q), ("descale_k", descale_k)):
        if value is None:
            continue
        if v_cache is not None or is_fp8_kvcache or dtype_name(q) != FP8:
            raise ValueError(
                f"{name}: got a value, expected None but for a q and a pool of {FP8} "
                "without v_cache"
            )
        array = jnp.asarray(value if isinstance(value, float | int) else to_jax(value))
        if array.size != 1:
            raise ValueError(f"{name}: got shape {array.shape}, expected one number")
        found[name] = array.reshape(()).astype(jnp.float32)
    return Descales(q=found.get("descale_q", 1.0), k=found.get("descale_k"))


def packed_rows(q: Any, k_cache: Any, head_dim_v: int) -> jax.Array:
    """The bytes of an fp8 pool, whose rows hold e4m3 numbers, scales and bfloat16 columns."""
    shape, width = tuple(k_cache.shape), q.shape[-1]
    expected = head_dim_v + 4 * -(-head_dim_v // GROUP) + 2 * (width - head_dim_v)
    if len(shape) != 4 or shape[-1] != expected:
        raise ValueError(
            f"k_cache: got shape {shape}, expected rows of {expected} bytes in [num_blocks, "
            f"{BLOCK}, kv_heads, bytes] beside q's width {width} and head_dim_v {head_dim_v}"
        )
    if k_cache.dtype.itemsize != 1:
        raise TypeError(f"k_cache: got dtype {dtype_name(k_cache)}, expected uint8 or {FP8}")
    if dtype_name(q) not in FLOATS:
        raise TypeError(
            f"q: got dtype {dtype_name(q)}, expected one of {', '.join(FLOATS)} beside an fp8 pool "
            f"of bytes. {FIX_DTYPES}"
        )
    check_strides("k_cache", k_cache, 2)
    if isinstance(k_cache, np.ndarray):
        return jnp.asarray(k_cache)
    return k_cache if isinstance(k_cache, jax.Array) else jnp.from_dlpack(k_cache)
