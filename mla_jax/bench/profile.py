"""What the warpgroups of the Mosaic GPU decode kernel wait for: a trace taken within the kernel.

Pallas stores the clock of a core at the start and the end of every named stage in shared memory,
and the launch leaves a Chrome trace (for Perfetto or chrome://tracing; a process is a core, a
thread a warpgroup). Its times are thousands of clocks, not microseconds.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.bench.paged import PagedShape, make_inputs, problem_of
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels.device import current_device
from pallas_kernels.paged_attention.mosaic_gpu import role_names
from pallas_kernels.paged_decode import mosaic_gpu

RUNS = 3
"""The last one's trace counts: the first compiles, and fills caches."""


class Stage(NamedTuple):
    """How often a warpgroup was in a stage, and thousands of clocks that it took."""

    role: str
    name: str
    count: int
    median: float
    most: float
    total: float


def check() -> None:
    """NotImplementedError where the kernel cannot run."""
    if (lacks := mosaic_gpu.unfit(current_device())) is not None:
        raise NotImplementedError(f"profile: {lacks}")


def stages(events: Iterable[dict], roles: tuple[str, ...]) -> list[Stage]:
    """The stages of a Chrome trace whose threads are numbered by block, then by warpgroup."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    open_stages: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        thread = event["tid"]
        if event["ph"] == "B":
            open_stages[thread].append((event["name"], event["ts"]))
        else:
            name, begin = open_stages[thread].pop()
            taken[roles[(thread - 1) % len(roles)], name].append(event["ts"] - begin)
    return [
        Stage(role, name, len(times), statistics.median(times), max(times), sum(times))
        for (role, name), times in sorted(taken.items())
    ]


def profile(shape: PagedShape, folder: Path) -> tuple[Path, list[Stage]]:
    """(the trace, its stages) of one launch, left in a folder of the shape's name.

    Errors: NotImplementedError with the kernel's reason where it cannot run the shape.
    """
    problem = problem_of(shape)
    if (reason := mosaic_gpu.unsupported(problem)) is not None:
        raise NotImplementedError(f"profile: {shape.name}: {reason}")
    folder = folder / shape.name
    folder.mkdir(exist_ok=True)
    inputs = make_inputs(shape)
    table = inputs.table
    start = jnp.arange(table.shape[0], dtype=jnp.int32) * table.shape[1]

    @jax.jit
    def run(q_nope, q_pe, ckv, kpe):
        return mosaic_gpu.paged_decode_mosaic(
            *(q_nope, q_pe, ckv, kpe, table.reshape(-1), start, inputs.length),
            sm_scale=jnp.float32(DEFAULT_SM_SCALE),
            num_splits=None,
            deterministic=False,
            interpret=False,
            profile=str(folder),
        )

    for _ in range(RUNS):
        jax.block_until_ready(run(*inputs.args[:4]))
        jax.effects_barrier()
    trace = max(folder.glob("*-trace.json"), key=lambda path: path.stat().st_mtime)
    events = json.loads(trace.read_text())["traceEvents"]
    return trace, stages(events, role_names(mosaic_gpu.default_mosaic_tiles(problem)))
