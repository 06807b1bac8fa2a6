"""Decoding by a schedule beside its rivals: one launch, a launch for each level, split-KV, peers.

All of them get the same arrays: a page of 256 tokens is four pages of 64 that lie together, for
those who know no other. A chain's launches hand on their signals; its schedule is made once.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mla_jax.bench.paged import (
    DTYPE,
    PEERS_PAGE,
    PagedShape,
    Row,
    backend_for,
    check_agreement,
    make_inputs,
    ours,
)
from mla_jax.bench.peers import Contender, PagedInputs, Peer
from mla_jax.bench.schedules import SHAPES
from mla_jax.bench.timing import CALLS, alternating_seconds, burst_of
from mla_jax.megakernel import (
    CostModel,
    Schedule,
    check_signals,
    decode_with_signals,
    make_signals,
    schedule,
)
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels.backend import needs_gpu
from pallas_kernels.device import current_device

PAGE = 256
HEADS = (16, 8)
WAYS: dict[str, dict[str, Any]] = {
    "megakernel": {"backend": "megakernel"},
    "megakernel-global": {"backend": "megakernel", "queue": "global"},
    "triton": {"backend": "triton"},
    "reference": {"backend": "reference"},
}
"""How we decode by a schedule; the reference only where there is no GPU."""


def find_ways(names: Sequence[str] | None) -> list[str]:
    """The named ways; None is those that are worth a measurement here. Errors: ValueError."""
    if names is None:
        return ["reference"] if needs_gpu(current_device()) else list(WAYS)[:-1]
    for name in names:
        if name not in WAYS:
            raise ValueError(f"backend: got {name!r}, expected some of {', '.join(WAYS)}")
    return list(names)


def find_shapes(names: Sequence[str] | None) -> list[PagedShape]:
    """The named shapes of record with 16 and 8 heads; None is all. Errors: ValueError."""
    for name in names or ():
        if name not in SHAPES:
            raise ValueError(f"shapes: got {name!r}, expected all or some of {', '.join(SHAPES)}")
    return [
        PagedShape(
            name=f"{name}-h{heads}",
            lengths=tuple(SHAPES[name][0]),
            heads=heads,
            tokens=SHAPES[name][1],
            page_size=PAGE,
        )
        for name in (names or SHAPES)
        for heads in HEADS
    ]


Launch = Callable[..., tuple[Array, Array]]
"""(output, signals) of (signals, schedule, q_rot, q_v, k_rot, v, table)."""


def decode_chain(launch: Launch, calls: int) -> Callable[..., tuple[Array, Array, Array]]:
    """A jitted program of (schedule, q_v, q_rot, v, k_rot, table): first output, last, signals.

    Each of `calls` launches takes the previous one's output for its q_v, and its signals.
    """
    call = jax.jit(launch)  # traced and lowered once for all calls

    def program(plan: Schedule, q_v: Array, q_rot: Array, v: Array, k_rot: Array, table: Array):
        out, signals = call(make_signals(plan), plan, q_rot, q_v, k_rot, v, table)
        last = out
        for _ in range(calls - 1):
            last, signals = call(signals, plan, q_rot, last, k_rot, v, table)
        return out, last, signals

    return jax.jit(program)


def by_schedule(
    plan: Schedule, inputs: PagedInputs, *, calls: int = CALLS, **way: Any
) -> Contender:
    """`mla_decode` by `plan`, of 16 or 8 heads; its output is the first of a chain."""

    def launch(*args: Any) -> tuple[Array, Array]:
        return decode_with_signals(*args, scale=DEFAULT_SM_SCALE, **way)

    chain, args = decode_chain(launch, calls), (plan, *inputs.args[:-1])

    def output() -> np.ndarray:
        out, _, signals = chain(*args)
        check_signals(signals)
        return np.asarray(out.astype(jnp.float32))

    return Contender(burst=burst_of(chain, *args), output=output, calls=calls)


def in_pages_of_peers(inputs: PagedInputs) -> PagedInputs:
    """The same tokens, as pages of 64."""
    parts = PAGE // PEERS_PAGE

    def cut(pool: Array) -> Array:
        return pool.reshape(-1, PEERS_PAGE, pool.shape[-1])

    table = inputs.table[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)
    return dataclasses.replace(
        inputs,
        ckv=cut(inputs.ckv),
        kpe=cut(inputs.kpe),
        table=table.reshape(len(inputs.table), -1),
    )


def bench_shape(
    shape: PagedShape,
    ways: Sequence[str],
    peers: dict[str, Peer],
    ceilings: dict[str, float],
    seed: int = 0,
) -> Iterator[Row]:
    """A row for each way and rival, all of which take turns: ratio is the rival's time over ours.

    The rivals are `peers` and our own split-KV decode, paged_decode. makespan_us is what the
    schedule's cost model promises, by default costs or by those of `mla-jax tune megakernel`.
    Errors: RuntimeError if two outputs do not agree, or a launch has waited in vain.
    """
    inputs = make_inputs(shape, seed)
    plan = schedule(shape.lengths, shape.tokens, num_heads=shape.heads)
    own = {name: by_schedule(plan, inputs, **WAYS[name]) for name in ways}
    cut = in_pages_of_peers(inputs)
    rivals = {"paged_decode": ours(cut, None)}
    rivals |= {name: peer.prepare(cut) for name, peer in peers.items()}
    contenders = {**own, **rivals}

    def prepared(contender: Contender) -> np.ndarray:
        contender.burst(1)
        return contender.output()

    # Their compilers run side by side.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(prepared, contenders.values())
        outputs = dict(zip(contenders, results, strict=True))
    for name in ways:
        for rival in rivals:
            check_agreement(shape.name, rival, outputs[name], outputs[rival])
    seconds = alternating_seconds([contender.burst for contender in contenders.values()])
    micros = {
        name: time / contender.calls * 1e6
        for (name, contender), time in zip(contenders.items(), seconds, strict=True)
    }
    split = backend_for(dataclasses.replace(shape, page_size=PEERS_PAGE), None)
    for name, (rival, peer_us) in itertools.product(ways, ((r, micros[r]) for r in rivals)):
        yield {
            "op": "megakernel",
            "shape": shape.name,
            "dtype": DTYPE,
            "backend": name,
            "ours_us": micros[name],
            "peer": f"{rival} ({split})" if rival == "paged_decode" else rival,
            "peer_us": peer_us,
            "ratio": peer_us / micros[name],
            "costs": "default" if plan.cost_model == CostModel() else "tuned",
            "makespan_us": plan.makespan,
            "over_makespan": micros[name] / plan.makespan,
            "gb_s": shape.moved / micros[name] / 1e3,
            "times_floor": micros[name] / shape.floor(ceilings),
        }
