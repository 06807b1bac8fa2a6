"""What the kernels with separate keys and values share: tiles, masks, the running softmax.

Triton's tiles have power-of-two sides: a head of 192 is held in parts of 128 and 64, as
`causal_prefill.blocks.columns` cuts it. Scores are in base 2: log2(e) is in their scale.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike

from pallas_kernels.causal_prefill.blocks import (
    MAX_WIDTH,
    columns,
    dot,
    load_parts,
    unsplit_width,
)
from pallas_kernels.causal_prefill.tiles import SHARED_BYTES
from pallas_kernels.checks import FLOATS
from pallas_kernels.exponential import LOG2_E, NEG_INF, exp2
from pallas_kernels.precision import FP8

BLOCK = 64
"""Tokens of a cache block, and the side of a block of a sparse layout."""
DTYPES = (*FLOATS, FP8)

Parts = tuple[Array, ...]


def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """What a product is made of, and a result's dtype: e4m3 becomes bfloat16, which holds it."""
    return jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype


def unsupported_width(width: int) -> str | None:
    """None if a tile can hold heads of this width, else the reason why not."""
    if width > MAX_WIDTH:
        return f"head width is {width}, a tile holds at most {MAX_WIDTH}"
    return unsplit_width(width)


def load_block(ref, first, row, present=None) -> Parts:
    """ref[first, row], in parts; where not `present`, zeros, whatever lies there."""
    dtype = compute_dtype(ref.dtype)
    return tuple(part.astype(dtype) for part in load_parts(ref, (first, row[:, None]), present))


def apply_mask(s, ref, index, position, present):
    """Scores under the mask ref[*index, position]: bool keeps, a float is added (natural units)."""
    *first, row = index
    at = ref.at[*first, row[:, None], position[None, :]]
    mask = plgpu.load(at, mask=present, other=0)
    if mask.dtype == jnp.int8:
        return jnp.where(mask != 0, s, NEG_INF)
    return s + mask.astype(jnp.float32) * LOG2_E


def stages_that_fit(
    rows: int, keys: int, *, width: int, dtype: DTypeLike, mask_bytes: int, blocks_per_core: int
) -> int:
    """How many steps of `keys` keys and values, and of a mask, a block has room for beside q."""
    itemsize = jnp.dtype(compute_dtype(dtype)).itemsize
    room = SHARED_BYTES // blocks_per_core - rows * width * itemsize
    return room // (2 * keys * width * itemsize + rows * keys * mask_bytes)


def mask_bytes(mask: Array | None) -> int:
    """Bytes of one element of a mask, 0 without."""
    return 0 if mask is None else mask.dtype.itemsize


def as_loadable(mask: Array) -> Array:
    """The mask as a kernel loads it: the bytes of a bool."""
    return mask.view(jnp.int8) if mask.dtype == jnp.bool_ else mask


class Running(NamedTuple):
    """A softmax so far: the weighted sum of values, the maximum, the sum of exponentials."""

    acc: Parts
    m: Array
    l: Array

    @classmethod
    def empty(cls, rows: int, width: int) -> "Running":
        return cls(
            acc=tuple(jnp.zeros((rows, size), jnp.float32) for _, size in columns(width)),
            m=jnp.full((rows,), NEG_INF, jnp.float32),
            l=jnp.zeros((rows,), jnp.float32),
        )

    def add(self, s, values: Parts, *, masked: bool, interpret: bool) -> "Running":
        """With a block of keys more; masked: some scores may be -inf."""
        m = jnp.maximum(self.m, jnp.max(s, axis=1))
        # A row that has seen no key keeps m = -inf; shifting by 0 makes its terms 0, not NaN.
        shift = jnp.where(m == NEG_INF, 0.0, m) if masked else m
        p, keep = exp2(s - shift[:, None], interpret), exp2(self.m - shift, interpret)
        weights = p.astype(values[0].dtype)
        acc = tuple(
            a * keep[:, None] + dot(weights, v) for a, v in zip(self.acc, values, strict=True)
        )
        return Running(acc, m, self.l * keep + jnp.sum(p, axis=1))

    def finish(self) -> tuple[Parts, Array]:
        """(out, base-2 lse); 0 and -inf for a row that saw no key."""
        empty = self.l == 0.0
        l = jnp.where(empty, 1.0, self.l)
        out = tuple(jnp.where(empty[:, None], 0.0, a / l[:, None]) for a in self.acc)
        return out, jnp.where(empty, NEG_INF, self.m + jnp.log2(l))
