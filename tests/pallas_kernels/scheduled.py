"""Cases of decoding by a schedule, and dense attention in float64 over them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from oracles import GARBAGE, float64, softmax_sum

from pallas_kernels.schedule import Schedule

ROPE, LATENT, PAGE = 64, 512, 256
SCALE = (LATENT + ROPE) ** -0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledCase:
    """The arrays of a call, without its schedule."""

    q_rot: jax.Array
    q_v: jax.Array
    k_rot: jax.Array
    v: jax.Array
    table: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return *(float64(array) for array in self.args[:4]), np.asarray(self.table)


def make_scheduled(
    rng: np.random.Generator,
    lengths: Sequence[int],
    tokens: int,
    heads: int = 16,
    *,
    dtype: str = "float32",
    num_pages: int | None = None,
    max_pages: int | None = None,
) -> ScheduledCase:
    """Pages in random order from a pool that is NaN where no sequence reads; garbage ids behind."""
    pages_of = [-(-length // PAGE) for length in lengths]
    num_pages = num_pages or sum(pages_of) + 2
    shape = len(lengths), max_pages or max(pages_of) + 1
    table = rng.choice(GARBAGE, shape).astype(np.int32)
    free = rng.permutation(num_pages).tolist()
    k_rot = np.full((num_pages, PAGE, ROPE), np.nan, np.float32)
    v = np.full((num_pages, PAGE, LATENT), np.nan, np.float32)
    for row, pages, length in zip(table, pages_of, lengths, strict=True):
        row[:pages] = [free.pop() for _ in range(pages)]
        for i, page in enumerate(row[:pages]):
            used = min(length - i * PAGE, PAGE)
            k_rot[page, :used] = rng.standard_normal((used, ROPE))
            v[page, :used] = rng.standard_normal((used, LATENT))
    rows = len(lengths), tokens, heads
    queries = (rng.standard_normal((*rows, width)) for width in (ROPE, LATENT))
    q_rot, q_v, k_rot, v = (jnp.asarray(array, dtype) for array in (*queries, k_rot, v))
    return ScheduledCase(q_rot=q_rot, q_v=q_v, k_rot=k_rot, v=v, table=jnp.asarray(table))


def dense(case: ScheduledCase, lengths: Sequence[int]) -> np.ndarray:
    """Query token i of n sees the keys j <= length - n + i; 0 where there is none."""
    q_rot, q_v, k_rot, v, table = case.arrays
    out = np.zeros(q_v.shape)
    tokens = q_v.shape[1]
    for b, length in enumerate(lengths):
        pages = table[b, : -(-length // PAGE)]
        keys, rope = v[pages].reshape(-1, LATENT), k_rot[pages].reshape(-1, ROPE)
        for i in range(tokens):
            if (seen := length - tokens + i + 1) > 0:
                scores = q_v[b, i] @ keys[:seen].T + q_rot[b, i] @ rope[:seen].T
                out[b, i], _ = softmax_sum(scores * SCALE, keys[:seen])
    return out


def changed(plan: Schedule, table: np.ndarray) -> Schedule:
    """`plan` with another table, which is not checked."""
    return Schedule(
        instructions=jnp.asarray(table),
        batch=plan.batch,
        new_tokens=plan.new_tokens,
        num_heads=plan.num_heads,
        bounds=plan.bounds,
    )


def without(table: np.ndarray | jax.Array, uid: int) -> np.ndarray:
    """`table` with a no-op in this instruction's place."""
    table = np.array(table)
    table[table[..., 1] == uid] = 0
    return table
