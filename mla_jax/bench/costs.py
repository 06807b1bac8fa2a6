"""What the megakernel is tuned by: its fastest tiles, then what its instructions cost with them.

The cost model comes from the times of hand-made schedules.
Three kinds of schedule, each of which fills the device, show what the model adds up:

    whole       a partial for each processor             overhead + steps * step
    delivered   partials for a reduction that waits      + latency + inputs * input + tail
    held        ... whose processor had a partial too    + start + inputs * input + tail

overhead is a partial's start and write-out together, the launch included, and tail a reduction's
write-out and synchronization. Least squares gives these sums; they are shared out as in the
default model.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mla_jax.bench.megakernel import PAGE, decode_chain
from mla_jax.bench.paged import DTYPE, PagedShape, make_inputs
from mla_jax.bench.schedules import SHAPES
from mla_jax.bench.timing import CALLS, alternating_seconds, burst_of
from mla_jax.bench.tune import Target, Workload
from mla_jax.megakernel import CostModel, Schedule, check_signals, schedule
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels.megakernel.persistent import run_persistent
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_attention.tiles import default_tiles
from pallas_kernels.schedule.instructions.backward import FIRST_REDUCTION
from pallas_kernels.schedule.instructions.costs import DEFAULT_COSTS
from pallas_kernels.schedule.instructions.quality import STEP
from pallas_kernels.schedule.instructions.table import pack_queues
from pallas_kernels.schedule.instructions.words import PARTIAL, REDUCTION
from pallas_kernels.tuning import Entry

# Rows, keys, warps, stages.
TILES = (
    *((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3), (64, 32, 4, 3)),
    *((32, 64, 4, 2), (32, 64, 8, 3), (32, 32, 4, 3), (32, 32, 8, 4)),
    *((16, 64, 4, 3), (16, 64, 8, 3), (16, 32, 4, 3), (16, 32, 4, 5), (16, 128, 8, 2)),
)
LEAST = 1e-3
"""µs: what the fit finds to be less is noise."""


class Experiment(NamedTuple):
    """A kind, the steps of each partial, and the inputs of each reduction."""

    kind: str
    steps: int
    inputs: int = 1


EXPERIMENTS = (
    *(Experiment("whole", steps) for steps in (2, 8, 16, 32, 64)),
    *itertools.starmap(Experiment, itertools.product(("delivered", "held"), (4, 16), (4, 8, 16))),
)


def hand_made(experiment: Experiment, tokens: int, heads: int, processors: int) -> Schedule:
    """The schedule of an experiment, of as many equal sequences as the processors hold.

    Each query token's reduction has a processor of its own; held ones need as many inputs.
    """
    kind, steps, inputs = experiment
    length = inputs * steps * STEP
    width = inputs + (tokens if kind == "delivered" else 0)
    batch = max(1, processors // width)
    reduction_uids = itertools.count(max(FIRST_REDUCTION, batch * inputs))
    queues: list[list[list[int]]] = []
    for sequence in range(batch):
        uids = range(sequence * inputs, (sequence + 1) * inputs)
        own: list[list[list[int]]] = [[] for _ in range(width)]
        for i, uid in enumerate(uids):
            row = sequence if kind == "whole" else -uid - 1
            keys = (i * steps * STEP, (i + 1) * steps * STEP, length)
            own[i].append([PARTIAL, uid, row, 0, sequence, 0, *keys])
        for token in range(0 if kind == "whole" else tokens):
            words = [REDUCTION, next(reduction_uids), inputs - 1, sequence, token, *uids]
            own[(inputs + token if kind == "delivered" else token) % width].append(words)
        queues += own
    table = pack_queues(queues)
    return Schedule(instructions=table, batch=batch, new_tokens=tokens, num_heads=heads)


def _terms(experiment: Experiment) -> list[float]:
    """How often each sum is in a time: overhead, step, latency + tail, start + tail, input."""
    kind, steps, inputs = experiment
    reduced = kind != "whole"
    return [1, steps, kind == "delivered", kind == "held", inputs * reduced]


def fit_costs(experiments: Sequence[Experiment], micros: Sequence[float]) -> CostModel:
    """The cost model whose times are nearest those of the experiments."""
    terms = np.array([_terms(experiment) for experiment in experiments], float)
    weights = 1 / np.asarray(micros)  # relative errors count, else the longest run would
    sums, *_ = np.linalg.lstsq(terms * weights[:, None], np.ones(len(micros)), rcond=None)
    overhead, step, delivered, held, each = np.maximum(sums, LEAST).tolist()
    default = DEFAULT_COSTS
    of_overhead = overhead / default.partial_overhead
    of_tail = delivered / default.reduction_tail
    tail = of_tail * (default.reduction_writeout + default.synchronization)
    start = max(held - tail, LEAST)
    return CostModel(
        partial_start=of_overhead * default.partial_start,
        partial_step=step,
        partial_writeout=of_overhead * default.partial_writeout,
        reduction_start=start,
        reduction_start_in_quality=start
        * (default.reduction_start_in_quality / default.reduction_start),
        reduction_input=each,
        reduction_latency=of_tail * default.reduction_latency,
        reduction_writeout=of_tail * default.reduction_writeout,
        synchronization=of_tail * default.synchronization,
    )


def _how(interpret: bool) -> dict[str, Any]:
    """Processors that wait need the queue of all in the interpreter."""
    return {"queue": "global" if interpret else "processors", "interpret": interpret}


def tiles_target(
    *,
    tokens: int,
    heads: int,
    lengths: Sequence[int] = SHAPES["four-s45118-n4"][0],
    calls: int = CALLS,
    interpret: bool = False,
) -> Target:
    """The one launch's tiles, on a batch of which one sequence is long."""
    rows = tokens * heads
    shape = PagedShape(
        name="tiles", lengths=tuple(lengths), heads=heads, tokens=tokens, page_size=PAGE
    )

    def call(tiles: PagedTiles) -> Callable[..., Array]:
        plan = schedule(lengths, tokens, num_heads=heads)

        def run(q_v: Array, q_rot: Array, v: Array, k_rot: Array, table: Array, _: Array) -> Array:
            arrays = (q_rot, q_v, k_rot, v, table, jnp.float32(DEFAULT_SM_SCALE))
            how = {**_how(interpret), "tiles": tiles}
            return run_persistent(plan, None, None, *arrays, **how)[0]

        return run

    return Target(
        key={"op": "megakernel", "rows": rows, "dtype": DTYPE},
        default=default_tiles(rows, DTYPE),
        candidates=[
            PagedTiles(
                rows=height, keys=keys, num_warps=warps, num_stages=stages, blocks_per_core=1
            )
            for height, keys, warps, stages in TILES
            if height == default_tiles(rows, DTYPE).rows
        ],
        workloads=lambda: [Workload(call=call, args=make_inputs(shape).args, calls=calls)],
    )


class Trial(NamedTuple):
    """What differs between the launches of an experiments' program."""

    plan: Schedule
    table: Int[Array, "batch max_pages"]


def _trials(plans: Sequence[Schedule], order: Int[np.ndarray, " pages"]) -> list[Trial]:
    """The plans in equal sizes, so that one program runs them all, with pages from `order`.

    Sequences that a plan lacks are rows without an instruction.
    """
    batch = max(plan.batch for plan in plans)
    largest = functools.reduce(Schedule.as_large_as, plans)
    pages_of = [-(-plan.lengths // PAGE) for plan in plans]
    widest = max(pages.max() for pages in pages_of)
    trials = []
    for plan, pages in zip(plans, pages_of, strict=True):
        table = np.zeros((batch, widest), np.int32)
        listed = np.arange(widest) < np.pad(pages, (0, batch - plan.batch))[:, None]
        table[listed] = order[: pages.sum()]
        sized = plan.as_large_as(largest)
        # On the device, where nobody asks for the lacking rows.
        words = jnp.asarray(sized.instructions)
        trials.append(
            Trial(dataclasses.replace(sized, instructions=words, batch=batch), jnp.asarray(table))
        )
    return trials


def measured(
    plans: Sequence[Schedule],
    tokens: int,
    heads: int,
    tiles: PagedTiles | None,
    *,
    calls: int = CALLS,
    interpret: bool = False,
) -> list[float]:
    """Microseconds of a launch of each plan on the present GPU; all take turns in one program.

    tiles: None is those that a call gets. Errors: RuntimeError if a launch has waited in vain.
    """
    pages = max(int((-(-plan.lengths // PAGE)).sum()) for plan in plans)
    batch = max(plan.batch for plan in plans)
    lengths = (PAGE,) * max(pages, batch)
    shape = PagedShape(name="costs", lengths=lengths, heads=heads, tokens=tokens, page_size=PAGE)
    inputs = make_inputs(shape)
    queries = inputs.q_nope[:batch], inputs.q_pe[:batch]

    def launch(signals: Array, plan: Schedule, *arrays: Array) -> tuple[Array, Array]:
        how = {**_how(interpret), "scale": jnp.float32(DEFAULT_SM_SCALE), "tiles": tiles}
        return run_persistent(plan, None, signals, *arrays, **how)

    chain, bursts = decode_chain(launch, calls), []
    for trial in _trials(plans, np.asarray(inputs.table[:, 0])):
        args = (trial.plan, *queries, inputs.ckv, inputs.kpe, trial.table)
        check_signals(chain(*args)[-1])
        bursts.append(burst_of(chain, *args))
    return [seconds / calls * 1e6 for seconds in alternating_seconds(bursts)]


def measure_costs(
    tokens: int,
    heads: int,
    processors: int,
    tiles: PagedTiles | None = None,
    time: Callable[..., list[float]] | None = None,
) -> tuple[Entry, list[tuple[Experiment, float, float]]]:
    """The table's entry; and each experiment with its time and the fitted model's, in µs.

    time: None is `measured`, whose errors it has.
    """
    experiments = [each for each in EXPERIMENTS if each.inputs + tokens <= processors]
    plans = [hand_made(each, tokens, heads, processors) for each in experiments]
    micros = (time or measured)(plans, tokens, heads, tiles)
    costs = fit_costs(experiments, micros)
    promised = [dataclasses.replace(plan, cost_model=costs).makespan for plan in plans]
    entry = {
        "op": "megakernel_costs",
        "rows": tokens * heads,
        "costs": dataclasses.asdict(costs),
    }
    return entry, list(zip(experiments, micros, promised, strict=True))
