"""Grouped-query attention of `mla_jax.flash_mla`: paged decode and block-sparse prefill.

Decode counts each cached key and value once, queries and outputs, beside the rate of a copy in the
same run; prefill the pairs of query and key that its pattern leaves. Every output that is timed is
first compared with attention in plain float32, of a prompt at some of its queries.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mla_jax.bench.grouped_programs import (
    DTYPE,
    DecodeShape,
    Inputs,
    Pattern,
    PrefillShape,
    Program,
    Shape,
)
from mla_jax.bench.paged import relative_error
from mla_jax.bench.timing import alternating_seconds, burst_of, chained, rates, seconds_a_run

AGREEMENT, PEERS_AGREEMENT = 1e-2, 1e-1
"""Ours rounds to bfloat16 once; XLA may sum in it."""
BAR_OF_COPY, BAR_OF_BLOCKS, BAR_OF_CAUSAL = 0.85, 2.5, 1.7
"""What to reach: bytes a second over a copy's; ratios to our own kernel over all keys."""


def _decode(batch: int, heads: int, kv_heads: int, width: int, length: int, **bars) -> DecodeShape:
    return DecodeShape(
        name=f"B{batch}-h{heads}-kv{kv_heads}-d{width}-s{length}",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        length=length,
        **bars,
    )


def _prefill(pattern: Pattern, **bars: float) -> PrefillShape:
    name = f"h16-d128-t16384-{pattern}"
    return PrefillShape(name=name, heads=16, width=128, tokens=16384, pattern=pattern, bars=bars)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _decode(64, 32, 8, 128, 4096, bars={"cudnn": 1.0, "xla": 1.0}, bar_of_copy=BAR_OF_COPY),
        _decode(64, 16, 16, 128, 4096),
        _decode(64, 32, 8, 64, 4096),
        _decode(1, 32, 8, 128, 65536),
        _prefill("dense"),
        _prefill("causal", dense=BAR_OF_CAUSAL),
        _prefill("blocks25", dense=BAR_OF_BLOCKS),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program's chain, and `check(inputs)`: what a call gives, and what it should."""

    chain: Callable[..., Array]
    check: Callable[[Inputs], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a shape runs, compiled: its inputs, our call alone, and each contender's programs.

    lacks: why peers that are not among these could not be compiled.
    """

    draw: Callable[[Array], Inputs]
    alone: Callable[..., Array]
    programs: dict[str, Compiled]
    lacks: dict[str, str]


def find_shapes(names: Sequence[str] | None) -> list[Shape]:
    """The named shapes; None is all. Errors: ValueError, listing the names."""
    unknown = [name for name in names or () if name not in SHAPES]
    if unknown:
        raise ValueError(f"shapes: got {unknown[0]!r}, expected all or some of {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names or SHAPES]


def backend_for(shape: Shape, backend: str | None) -> str:
    """The backend that our call of this shape gets. Errors: as the operation's."""
    return shape.chosen(backend)


def _compile(program: Program, inputs: Inputs) -> Compiled | str:
    """The reason instead, where a peer's does not compile."""

    def check(inputs: Inputs) -> tuple[Array, Array]:
        out = program.call(*program.arguments(inputs))
        return program.seen(out).astype(jnp.float32), program.expected(inputs)

    try:
        chain = chained(program.call, program.calls).lower(*program.arguments(inputs)).compile()
        return Compiled(chain=chain, check=jax.jit(check).lower(inputs).compile())
    except Exception as error:  # cuDNN's checks raise three classes, XLA another
        if program.ours:
            raise
        return (str(error) or repr(error)).splitlines()[0]


def _submit(pool: ThreadPoolExecutor, shape: Shape, backend: str | None) -> Callable[[], Prepared]:
    """Starts to compile; the result waits for it."""
    key, programs = jax.random.key(0), shape.programs(backend)
    inputs = jax.eval_shape(shape.draw, key)
    own = programs["ours"]
    draw = pool.submit(lambda: jax.jit(shape.draw).lower(key).compile())
    alone = pool.submit(lambda: jax.jit(own.call).lower(*own.arguments(inputs)).compile())
    waiting = {name: pool.submit(_compile, each, inputs) for name, each in programs.items()}

    def finish() -> Prepared:
        results = {name: future.result() for name, future in waiting.items()}
        return Prepared(
            draw=draw.result(),
            alone=alone.result(),
            programs={name: each for name, each in results.items() if isinstance(each, Compiled)},
            lacks={name: each for name, each in results.items() if isinstance(each, str)},
        )

    return finish


def compile_ahead(shapes: Sequence[Shape], backend: str | None) -> dict[str, Prepared]:
    """What each shape runs, by its name, all compiled side by side before any is timed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        finishing = {shape.name: _submit(pool, shape, backend) for shape in shapes}
        return {name: finish() for name, finish in finishing.items()}


def bench_shape(
    shape: Shape,
    ceilings: dict[str, float],
    *,
    backend: str | None = None,
    seed: int = 0,
    prepared: dict[str, Prepared] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each peer, the bursts of all taking turns; one without, where none can run.

    ratio is the peer's time over ours. alone_us: our call as a program of its own, its plan and its
    launch included, of which a chain makes one. of_copy: our bytes a second over a copy's. bar,
    bar_of_copy: what these two should reach. lacks: the peers that are left out, because they do
    not compile, or are wrong. prepared: of `compile_ahead`, if it is there.
    Errors: the operation's; RuntimeError if our output is wrong.
    """
    ready = (prepared or compile_ahead([shape], backend))[shape.name]
    programs, inputs = shape.programs(backend), ready.draw(jax.random.key(seed))
    lacks = dict(ready.lacks)
    bursts = {}
    for name, compiled in ready.programs.items():
        program = programs[name]
        error = relative_error(*map(np.asarray, compiled.check(inputs)))
        at_most = AGREEMENT if program.ours else PEERS_AGREEMENT
        if error < at_most:
            bursts[name] = burst_of(compiled.chain, *program.arguments(inputs))
            continue
        lacks[name] = f"{error:.2e} away from plain attention, expected {at_most:.0e}"
        if program.ours:
            raise RuntimeError(f"{shape.name}: the output of {name} is {lacks[name]}")
    own = programs["ours"]
    alone = seconds_a_run(ready.alone, *own.arguments(inputs), burst=own.calls)
    seconds = dict(zip(bursts, alternating_seconds(list(bursts.values())), strict=True))
    micros = {name: 1e6 * second / programs[name].calls for name, second in seconds.items()}
    ours = micros.pop("ours")
    row = {
        "op": shape.op,
        "shape": shape.name,
        "dtype": DTYPE,
        "backend": backend_for(shape, backend),
        "ours_us": ours,
        "alone_us": 1e6 * alone,
    }
    speed = rates(shape.moved, shape.flops, ours, ceilings)
    if isinstance(shape, DecodeShape):
        speed["of_copy"] = speed["gb_s"] / ceilings["copy_gb_s"]
    if shape.bar_of_copy is not None:
        speed["bar_of_copy"] = shape.bar_of_copy
    rest = speed | ({"lacks": lacks} if lacks else {})
    for peer, time in micros.items():
        against = {"peer": peer, "peer_us": time, "ratio": time / ours}
        bar = {"bar": shape.bars[peer]} if peer in shape.bars else {}
        yield row | against | bar | rest
    if not micros:
        yield row | rest
