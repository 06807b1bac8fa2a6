"""What vmap and autodiff do with the paged kernels.

By itself, vmap would give every call a plan that fills the device, and scratch to match. Here the
mapped axis joins the requests: one launch serves all calls, and one plan cuts all of their keys.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap
from jaxtyping import Array

Results = tuple[Array, Array]
Arrays = tuple[Array, ...]


def _fold(
    calls: int,
    mapped: Sequence[tuple[bool, ...]],
    q: Arrays,
    pools: Arrays,
    requests: Arrays,
    *,
    sparse: bool,
) -> tuple[Arrays, Arrays, Arrays]:
    """(q, pools, requests) of one call with the requests of all `calls`.

    Pools that are not mapped serve all calls as they are; mapped ones stand one after the other.
    So do the ids, mapped or not: every request has ids of its own, which a plan relies on.
    """

    def each(arrays: Arrays, mapped: tuple[bool, ...]) -> list[Array]:
        return [
            array if is_mapped else jnp.broadcast_to(array, (calls, *array.shape))
            for array, is_mapped in zip(arrays, mapped, strict=True)
        ]

    q_nope, q_pe = each(q, mapped[0])
    page_ids, start, length, *queries = each(requests, mapped[2])
    call = jnp.arange(calls, dtype=jnp.int32)[:, None]
    start = start + call * page_ids.shape[1]
    if any(mapped[1]):
        pools = tuple(each(pools, mapped[1]))
        # Clamped before it moves, as the kernel would: an id stays in its own call's pool.
        num_pages = pools[0].shape[1]
        inside = jnp.clip(page_ids, 0, num_pages - 1)
        absent = sparse & (inside != page_ids)
        page_ids = jnp.where(absent, -1, inside + call * num_pages)
        pools = tuple(lax.collapse(pool, 0, 2) for pool in pools)
    if queries:
        tokens, (q_start, q_count) = q_nope.shape[1], queries
        queries = [jnp.clip(q_start, 0, tokens) + call * tokens, q_count]
    q_nope, q_pe, *rest = (
        lax.collapse(array, 0, 2) for array in (q_nope, q_pe, page_ids, start, length, *queries)
    )
    return (q_nope, q_pe), pools, tuple(rest)


def batchable(
    op: str, run: Callable[..., Results], *, sparse: bool = False
) -> Callable[..., Results]:
    """`run`, a paged kernel of the operation `op`, with vmap (nested too) and without a gradient.

    run(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, *queries, sm_scale, **static)
    -> (out, lse), where `queries` is nothing or (q_start, q_count). kv_scales, of an e4m3 cache, is
    one pool more, or a number like sm_scale: mapped numbers make the calls one after the other.
    sparse: an id outside the pool stands for no key. Differentiating raises NotImplementedError.
    """

    @functools.wraps(run)
    def call(*arrays: Array, kv_scales: Array | None = None, **static: object) -> Results:
        by_slot = kv_scales is not None and kv_scales.ndim > 0
        pools = (*arrays[2:4], *((kv_scales,) if by_slot else ()))
        numbers = (arrays[-1], *(() if kv_scales is None or by_slot else (kv_scales,)))

        @custom_vmap
        def attend(q: Arrays, pools: Arrays, requests: Arrays, numbers: Arrays) -> Results:
            scales = (*pools[2:], *numbers[1:])
            named = {"kv_scales": scales[0]} if scales else {}
            return run(*q, *pools[:2], *requests, numbers[0], **named, **static)

        @attend.def_vmap
        def rule(calls, mapped, *groups):
            if any(mapped[-1]):
                axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(mapped))
                results = jax.vmap(sequential_vmap(attend), axes)(*groups)
            else:
                folded = attend(*_fold(calls, mapped, *groups[:3], sparse=sparse), groups[3])
                results = tuple(x.reshape(calls, -1, *x.shape[1:]) for x in folded)
            return results, (True, True)

        differentiable = jax.custom_jvp(attend)

        @differentiable.defjvp
        def refuse(primals, tangents):
            raise NotImplementedError(
                f'{op}: the Pallas backends have no gradient, use backend="reference"'
            )

        return differentiable(arrays[:2], pools, arrays[4:-1], numbers)

    return call
