"""Ragged attention cases, and float64 and dense oracles of `causal_prefill`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from oracles import float64, softmax_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedCase:
    """The arrays of a `causal_prefill` call."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_start: jax.Array
    q_count: jax.Array
    kv_start: jax.Array
    kv_count: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def ranges(self) -> list[tuple[int, int, int, int]]:
        """(q_start, n, kv_start, m) of every request."""
        columns = (np.asarray(array).tolist() for array in self.args[3:])
        return list(zip(*columns, strict=True))


def make_ragged(
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 2,
    width: int = 32,
    value_width: int = 16,
    dtype: str = "float32",
    tokens: int | None = None,
    keys: int | None = None,
) -> RaggedCase:
    """Requests of (n, m) lengths with gaps between them; the keys' ranges in random order.

    Rows in no request are NaN. `tokens` and `keys` fix the arrays' shapes, for calls that must
    not compile again.
    """
    n, m = np.asarray(lengths).T
    gap = rng.integers(0, 4, len(n) + 1)
    q_start = np.cumsum(gap[:-1] + np.append(0, n[:-1]))
    order = rng.permutation(len(m))
    kv_start = np.zeros_like(m)
    kv_start[order] = np.cumsum(1 + gap[:-1] + np.append(0, m[order][:-1]))

    def rows(total, start, count, last):
        x = np.full((total, heads, last), np.nan, np.float32)
        for a, c in zip(start, count, strict=True):
            x[a : a + c] = rng.standard_normal((c, heads, last))
        return jnp.asarray(x, dtype)

    tokens = tokens or int(q_start[-1] + n[-1] + gap[-1] + 1)
    keys = keys or int((kv_start + m).max() + gap[-1] + 1)
    return RaggedCase(
        q=rows(tokens, q_start, n, width),
        k=rows(keys, kv_start, m, width),
        v=rows(keys, kv_start, m, value_width),
        **{
            name: jnp.asarray(array, jnp.int32)
            for name, array in (
                ("q_start", q_start),
                ("q_count", n),
                ("kv_start", kv_start),
                ("kv_count", m),
            )
        },
    )


def attention(case: RaggedCase, sm_scale: float, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse), a row at a time: query i of n sees keys j <= m - n + i."""
    q, k, v = float64(case.q), float64(case.k), float64(case.v)
    out = np.zeros((*q.shape[:2], v.shape[2]))
    lse = np.full(q.shape[:2], -np.inf)
    for q_start, n, kv_start, m in case.ranges:
        for i in range(n):
            seen = max(m - n + i + 1, 0) if causal else m
            if seen == 0:
                continue
            for head in range(q.shape[1]):
                keys = slice(kv_start, kv_start + seen)
                scores = k[keys, head] @ q[q_start + i, head] * sm_scale
                row = q_start + i, head
                out[row], lse[row] = softmax_sum(scores, v[keys, head])
    return out, lse


def dense_loss(q, k, v, weights, lse_weights, case: RaggedCase, sm_scale: float, causal: bool):
    """sum(out weights) + sum(lse lse_weights) in float32, request by request, static slices."""
    loss = jnp.float32(0)
    for q_start, n, kv_start, m in case.ranges:
        blind = max(n - m, 0) if causal else 0
        if n <= blind or m == 0:
            continue
        rows, keys = slice(q_start + blind, q_start + n), slice(kv_start, kv_start + m)
        scores = jnp.einsum("thd,khd->htk", q[rows], k[keys], precision="highest") * sm_scale
        if causal:
            mask = np.tri(n - blind, m, m - n + blind, dtype=bool)
            scores = jnp.where(mask, scores, -1e30)
        out = jnp.einsum("htk,khv->thv", jax.nn.softmax(scores), v[keys], precision="highest")
        lse = jax.nn.logsumexp(scores, axis=-1).T / np.log(2)
        loss += (out * weights[rows]).sum() + (lse * lse_weights[rows]).sum()
    return loss
