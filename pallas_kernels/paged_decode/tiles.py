"""The shape of a decode problem, and the tiles that the Triton kernel cuts it into."""

import dataclasses
import math
from typing import Self

from jaxtyping import Array

from pallas_kernels.device import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeProblem:
    """Everything static about a call: B requests of S query tokens and H heads each."""

    batch: int
    tokens: int
    heads: int
    latent: int
    rope: int
    page_size: int
    dtype: str
    capacity: int
    """Tokens that a request's pages can hold, on average: what bounds useful splits."""

    @classmethod
    def of(cls, q_nope: Array, q_pe: Array, ckv_cache: Array, page_ids: Array) -> Self:
        """The problem that arrays of these shapes pose."""
        batch, tokens, heads, latent = q_nope.shape
        page_size = ckv_cache.shape[1]
        return cls(
            batch=batch,
            tokens=tokens,
            heads=heads,
            latent=latent,
            rope=q_pe.shape[-1],
            page_size=page_size,
            dtype=str(q_nope.dtype),
            capacity=-(-page_ids.shape[0] * page_size // batch),
        )

    @property
    def rows(self) -> int:
        """Query rows of one request; all of them share its keys."""
        return self.tokens * self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """`rows` queries by `keys` cached tokens a step; `splits` blocks share a request's keys."""

    rows: int
    keys: int
    splits: int
    num_warps: int
    num_stages: int


DEFAULT_CORES = 132
MAX_SPLITS = 64


def choose_tiles(
    problem: DecodeProblem, device: Device, num_splits: int | None = None
) -> DecodeTiles:
    """Tiles for `problem`, from shapes alone, so that one program serves all lengths.

    Found on an H200: few rows want small blocks, several on a core, so that loads of one hide
    behind the arithmetic of another; many rows want wide blocks, since every block of rows reads
    the whole cache again.
    """
    rows = min(max(16, 1 << (problem.rows - 1).bit_length()), 64)
    keys = 32 if problem.dtype == "float32" else 64
    if num_splits is None:
        cores = device.num_cores or DEFAULT_CORES
        blocks = problem.batch * -(-problem.rows // rows)
        wanted = (2 if rows <= 32 else 1) * cores / blocks
        num_splits = 1 << max(0, round(math.log2(min(wanted, MAX_SPLITS))))
        # More blocks than steps only add to the merge.
        steps = -(-problem.capacity // keys)
        num_splits = min(num_splits, 1 << max(0, steps - 1).bit_length())
    return DecodeTiles(
        rows=rows,
        keys=keys,
        splits=num_splits,
        num_warps=4 if rows <= 32 else 8,
        num_stages=3 if rows <= 32 else 2,
    )
