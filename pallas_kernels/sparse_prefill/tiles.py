"""The shape of a sparse prefill, its tiles, and which keys each block of queries meets."""

import dataclasses
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.causal_prefill.tiles import CausalTiles
from pallas_kernels.device import Device
from pallas_kernels.grouped_attention.blocks import (
    BLOCK,
    mask_bytes,
    stages_that_fit,
    unsupported_width,
)
from pallas_kernels.tuning import tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseProblem:
    """Everything static about a call."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    width: int
    dtype: str
    causal: bool
    paged: bool
    layout: tuple[int, int] | None
    """Leading axes, 1 or batch and 1 or heads, of the layout; None without one."""
    mask: tuple[int, int] | None
    """The same of the mask."""
    mask_bytes: int = 0
    """Those of a mask's element."""

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        layout: Array | None,
        mask: Array | None,
        block_table: Array | None,
        causal: bool,
    ) -> Self:
        """The problem that arrays of these shapes pose."""
        batch, heads, tokens, width = q.shape

        def leading(array: Array | None) -> tuple[int, int] | None:
            return None if array is None else (array.shape[0], array.shape[1])

        return cls(
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            tokens=tokens,
            width=width,
            dtype=str(q.dtype),
            causal=causal,
            paged=block_table is not None,
            layout=leading(layout),
            mask=leading(mask),
            mask_bytes=mask_bytes(mask),
        )

    @property
    def sparse(self) -> bool:
        """Whether a layout leaves blocks out."""
        return self.layout is not None


def unsupported(problem: SparseProblem) -> str | None:
    """None if the kernel can run `problem`, else the reason why not."""
    return unsupported_width(problem.width)


def default_tiles(problem: SparseProblem) -> CausalTiles:
    """Tiles on a device that has no table of its own. Found on an H100.

    A layout's blocks hold 64 queries; without one, taller tiles read the keys less often.
    """
    wide = problem.dtype == "float32"
    tall = not wide and not problem.sparse and problem.tokens >= 512 and problem.width <= 192
    rows = 2 * BLOCK if tall else BLOCK
    rows, keys = (BLOCK // 2,) * 2 if wide else (rows, BLOCK)
    stages = stages_that_fit(
        rows,
        keys,
        width=problem.width,
        dtype=problem.dtype,
        mask_bytes=problem.mask_bytes,
        blocks_per_core=1,
    )
    return CausalTiles(
        rows=rows,
        keys=keys,
        num_warps=8 if tall else 4,
        num_stages=max(1, min(2 if wide else 3, stages)),
    )


def choose_tiles(problem: SparseProblem, device: Device) -> CausalTiles:
    """The device's tuned tiles, else the default ones, from shapes alone.

    Tuned ones are those of long prompts without a mask, which takes memory of its own.
    """
    measured = problem.tokens >= 512 and problem.mask is None
    key = {"width": problem.width, "dtype": problem.dtype, "sparse": problem.sparse}
    found = tuned("sparse_prefill", device, **key) if measured else None
    return CausalTiles(**found) if found else default_tiles(problem)


class Visits(NamedTuple):
    """In layout l, block of queries i meets the first count[l, i] blocks of block[l, i], rising."""

    block: Int[Array, "layouts blocks blocks"]
    count: Int[Array, "layouts blocks"]


def plan_visits(layout: Bool[Array, "layouts blocks blocks"], causal: bool) -> Visits:
    """A layout as lists, so that a kernel loops over what it does and never looks at the rest."""
    blocks = layout.shape[-1]
    block = jnp.arange(blocks, dtype=jnp.int32)
    if causal:
        layout = layout & (block <= block[:, None])
    return Visits(
        block=jnp.sort(jnp.where(layout, block, blocks), axis=-1, stable=False),
        count=jnp.sum(layout, axis=-1, dtype=jnp.int32),
    )
