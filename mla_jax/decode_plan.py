"""Decode steps of a model by an instruction schedule: one plan for many steps and all layers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Int

from mla_jax.cache import PagedLatentCache
from mla_jax.config import MLAConfig, ModelConfig
from mla_jax.quantization import QuantizedPool
from mla_jax.sharding.layout import mesh_in_use
from pallas_kernels.megakernel import make_signals
from pallas_kernels.megakernel.api import LATENT, PAGE, ROPE
from pallas_kernels.schedule import Schedule, schedule
from pallas_kernels.schedule.instructions.table import HEADS

BACKEND = "megakernel"
"""The backend whose decode steps need a plan."""


class DecodePlan(NamedTuple):
    """What `decode_step` attends by, a pytree: a schedule, and the signals of its launches.

    The signals pass from launch to launch, so a step gives the plan back for the next one.
    """

    schedule: Schedule
    signals: Int[Array, " words"]


def unsupported(config: MLAConfig, page_size: int, cache_dtype: DTypeLike | None) -> str | None:
    """None, or why a schedule cannot serve such layers over such a cache (None: their dtype)."""
    expected = {
        "n_heads": (config.n_heads, HEADS),
        "kv_lora_rank": (config.kv_lora_rank, (LATENT,)),
        "qk_rope_head_dim": (config.qk_rope_head_dim, (ROPE,)),
        "index_n_heads": (config.index_n_heads, (0,)),
        "page_size": (page_size, (PAGE,)),
        "the cache's dtype": (jnp.dtype(cache_dtype or config.dtype).name, (config.dtype,)),
    }
    for name, (got, able) in expected.items():
        if got not in able:
            return f"{name} is {got}, expected {' or '.join(map(str, able))}"
    return None


def check_supported(
    config: ModelConfig, page_size: int = PAGE, cache_dtype: DTypeLike | None = None
) -> None:
    """NotImplementedError, with the reason, for what decode steps by a schedule cannot do."""
    reason = unsupported(config.mla, page_size, cache_dtype)
    if reason is None and mesh_in_use() is not None:
        reason = "it runs on one device, and a mesh is set"
    if reason:
        raise NotImplementedError(f"backend {BACKEND!r} cannot run this decode_step: {reason}")


def plan_decode(
    config: ModelConfig,
    lengths: Sequence[int | None],
    *,
    steps: int,
    like: DecodePlan | None = None,
) -> DecodePlan:
    """A plan for `steps` decode steps of rows that have `lengths` tokens in the cache.

    Made on the host, in milliseconds. It serves all layers, and every step until a row has
    outgrown it. A row that has ended has None, and gets no work. like: an earlier plan, in whose
    sizes this one comes if they suffice, so that one compilation serves both: begin with the plan
    of the longest lengths to come. Errors: NotImplementedError for a model that a schedule cannot
    serve, ValueError for a number that is out of range.
    Source: ThunderKittens' MLA decode scheduler.

    >>> from mla_jax import presets
    >>> config = presets["deepseek-v2-lite"]
    >>> room = plan_decode(config, [4000, 900], steps=96)
    >>> plan = plan_decode(config, [300, None], steps=32, like=room)
    >>> plan.schedule.lengths.tolist()
    [332, 0]
    >>> plan.schedule.bounds == room.schedule.bounds
    True
    """
    check_supported(config)
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    for row, length in enumerate(lengths):
        if length is not None and length < 0:
            raise ValueError(f"lengths: got {length} for row {row}, expected None, or 0 or more")
    made = schedule(
        [0 if length is None else length + steps for length in lengths],
        new_tokens=1,
        num_heads=config.mla.n_heads,
    )
    if like is not None:
        made = made.as_large_as(like.schedule)
    return DecodePlan(made, make_signals(made))


def plan_room(config: ModelConfig, lengths: Sequence[int], *, steps: int) -> DecodePlan:
    """A plan whose sizes serve these rows for `steps` steps, and the longest of them alone.

    Rows that end leave their processors to the others, whose trees then grow: tried are half of
    the rows, a quarter, and so on.
    """
    plan, kept = None, len(lengths)
    by_length = np.argsort(lengths)[::-1]
    while kept:
        left = set(by_length[:kept].tolist())
        rows = [length if row in left else None for row, length in enumerate(lengths)]
        plan = plan_decode(config, rows, steps=steps, like=plan)
        kept //= 2
    assert plan is not None
    assert plan.schedule.bounds is not None
    # Of other lengths, trees have a few reductions more or fewer.
    partials, reductions, rows, depth = plan.schedule.bounds
    bounds = (partials, 2 * reductions, rows, depth)
    return plan._replace(schedule=dataclasses.replace(plan.schedule, bounds=bounds))


def check_plan(plan: DecodePlan, config: ModelConfig, cache: PagedLatentCache) -> None:
    """Errors: NotImplementedError as `check_supported`, ValueError for another batch's plan."""
    pool = cache.ckv[0]
    dtype = pool.values.dtype if isinstance(pool, QuantizedPool) else pool.dtype
    check_supported(config, cache.page_size, dtype)
    got = (plan.schedule.batch, plan.schedule.new_tokens, plan.schedule.num_heads)
    expected = (cache.max_batch, 1, config.mla.n_heads)
    if got != expected:
        raise ValueError(
            f"plan: got one for (rows, tokens, heads) {got}, expected {expected}: see plan_decode"
        )
