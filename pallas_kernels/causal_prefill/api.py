"""The one entry of causal prefill attention: a range of queries and one of keys a request."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.causal_prefill import triton
from pallas_kernels.causal_prefill.blocks import unsupported
from pallas_kernels.causal_prefill.reference import causal_prefill_reference
from pallas_kernels.causal_prefill.tiles import CausalProblem
from pallas_kernels.checks import FLOATS

# Fastest first.
BACKENDS = (
    Backend(
        name="triton",
        run=triton.causal_prefill_triton,
        unsupported=unsupported,
        unfit=needs_gpu,
    ),
    Backend(
        name="reference",
        run=lambda *args, causal, interpret: causal_prefill_reference(*args, causal=causal),
    ),
)


def _check(q: Array, k: Array, v: Array, ranges: dict[str, Array]) -> None:
    """ValueError for shapes, TypeError for dtypes."""
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"q: got shape {q.shape}, expected [tokens, heads, width], none empty")
    _, heads, width = q.shape
    if k.ndim != 3 or k.shape[1:] != (heads, width) or 0 in k.shape:
        raise ValueError(f"k: got shape {k.shape}, expected [keys, {heads}, {width}], as q's")
    if v.ndim != 3 or v.shape[:2] != k.shape[:2] or 0 in v.shape:
        raise ValueError(f"v: got shape {v.shape}, expected [{k.shape[0]}, {heads}, value_width]")
    if str(q.dtype) not in FLOATS:
        raise TypeError(f"q: got dtype {q.dtype}, expected one of {', '.join(FLOATS)}")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {q.dtype}, q's")
    batch = ranges["q_start"].shape
    for name, array in ranges.items():
        if array.ndim != 1 or array.shape != batch or 0 in batch:
            raise ValueError(f"{name}: got shape {array.shape}, expected one integer a request")
        if array.dtype != jnp.int32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")


def causal_prefill(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "keys heads width"],
    v: Float[Array, "keys heads value_width"],
    q_start: Int[Array, " batch"],
    q_count: Int[Array, " batch"],
    kv_start: Int[Array, " batch"],
    kv_count: Int[Array, " batch"],
    *,
    sm_scale: float | Float[Array, ""],
    causal: bool = True,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads value_width"], Float[Array, "tokens heads"]]:
    """Attention of ragged new tokens, MLA in its expanded form: keys and values of every head.

    Request b owns the rows q_start[b] : q_start[b] + q_count[b] of q and the rows
    kv_start[b] : kv_start[b] + kv_count[b] of k and v. Its n queries are the last n of its m
    positions: query i sees the keys j <= m - n + i, or all of them without `causal`. Scores are
    q k^T * sm_scale in float32, sm_scale > 0. Query ranges are disjoint and q_start ascends,
    empty requests included; key ranges may come in any order and overlap. Rows in no range are
    never used, whatever they hold. Every array may be traced: one compile serves all lengths.

    Returns out [tokens, heads, value_width] of q's dtype and the base-2 log-sum-exp
    [tokens, heads] float32; a query that sees no key, and a row in no request, gives 0 and -inf.
    Both are differentiable in q, k and v; sm_scale counts as a constant. interpret: with
    backend="triton", run the kernels' Python on any device.
    Errors: ValueError (shape, sm_scale), TypeError (dtype), NotImplementedError (backend, with
    the reason).

    Source: the expanded form of DeepSeek-V2 (2024), section 2.1; kernels as in FlashAttention-2.

    >>> q, k, v = (jnp.ones((7, 2, width)) for width in (192, 192, 128))
    >>> start, count = jnp.array([0, 3]), jnp.array([3, 4])
    >>> out, lse = causal_prefill(q, k, v, start, count, start, count, sm_scale=192**-0.5)
    >>> out.shape, lse.shape
    ((7, 2, 128), (7, 2))
    """
    ranges = {"q_start": q_start, "q_count": q_count, "kv_start": kv_start, "kv_count": kv_count}
    _check(q, k, v, ranges)
    if isinstance(sm_scale, int | float) and not sm_scale > 0:
        raise ValueError(f"sm_scale: got {sm_scale}, expected a positive number")
    problem = CausalProblem.of(q, k, v, q_start, causal)
    chosen = choose("causal_prefill", BACKENDS, problem, backend)
    return chosen.run(
        *(q, k, v, *ranges.values(), jnp.asarray(sm_scale, jnp.float32)),
        causal=causal,
        interpret=interpret,
    )
