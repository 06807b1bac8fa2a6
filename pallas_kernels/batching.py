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
POOLS = (2, 3)
"""Which of a kernel's arguments are the pools."""


def _fold(calls: int, mapped: Sequence[bool], arrays: Sequence[Array]) -> list[Array]:
    """The arguments of one call with the requests of all `calls`.

    Pools that are not mapped serve all calls as they are; mapped ones stand one after the other.
    So do the ids, mapped or not: every request has ids of its own, which a plan relies on.
    """
    shared = () if any(mapped[i] for i in POOLS) else POOLS
    q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, *queries = (
        array if mapped[i] or i in shared else jnp.broadcast_to(array, (calls, *array.shape))
        for i, array in enumerate(arrays)
    )
    call = jnp.arange(calls, dtype=jnp.int32)[:, None]
    start = start + call * page_ids.shape[1]
    pools = [ckv_cache, kpe_cache]
    if not shared:
        # Clamped before it moves, as the kernel would: an id stays in its own call's pool.
        num_pages = ckv_cache.shape[1]
        page_ids = jnp.clip(page_ids, 0, num_pages - 1) + call * num_pages
        pools = [lax.collapse(pool, 0, 2) for pool in pools]
    if queries:
        tokens, (q_start, q_count) = q_nope.shape[1], queries
        queries = [jnp.clip(q_start, 0, tokens) + call * tokens, q_count]
    q_nope, q_pe, *requests = (
        lax.collapse(array, 0, 2) for array in (q_nope, q_pe, page_ids, start, length, *queries)
    )
    return [q_nope, q_pe, *pools, *requests]


def batchable(op: str, run: Callable[..., Results]) -> Callable[..., Results]:
    """`run`, a paged kernel of the operation `op`, with vmap (nested too) and without a gradient.

    run(q_nope, q_pe, ckv_cache, kpe_cache, page_ids, start, length, *queries, sm_scale, **static)
    -> (out, lse), where `queries` is nothing or (q_start, q_count). A mapped sm_scale makes the
    calls one after the other. Differentiating raises NotImplementedError.
    """

    @functools.wraps(run)
    def call(*arrays: Array, **static: object) -> Results:
        @custom_vmap
        def attend(*arrays: Array) -> Results:
            return run(*arrays, **static)

        @attend.def_vmap
        def rule(calls, mapped, *arrays):
            if mapped[-1]:
                axes = tuple(0 if is_mapped else None for is_mapped in mapped)
                results = jax.vmap(sequential_vmap(attend), axes)(*arrays)
            else:
                folded = attend(*_fold(calls, mapped[:-1], arrays[:-1]), arrays[-1])
                results = tuple(x.reshape(calls, -1, *x.shape[1:]) for x in folded)
            return results, (True, True)

        differentiable = jax.custom_jvp(attend)

        @differentiable.defjvp
        def refuse(primals, tangents):
            raise NotImplementedError(
                f'{op}: the Pallas backends have no gradient, use backend="reference"'
            )

        return differentiable(*arrays)

    return call
