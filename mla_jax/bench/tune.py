"""Which tiles are fastest on the present device: the entries of `pallas_kernels.tuning`'s tables.

A key has one answer for all batches and lengths, so that these do not change how a result is
rounded: tiles are ranked by the geometric mean of their times over the key's workloads.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mla_jax.bench import prefill
from mla_jax.bench.paged import AGREEMENT, PagedShape, make_inputs, relative_error
from mla_jax.bench.timing import CALLS, alternating_seconds, burst_of, chained
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels.causal_prefill import CausalProblem
from pallas_kernels.causal_prefill import tiles as causal
from pallas_kernels.causal_prefill.triton import causal_prefill_triton
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_attention.tiles import default_tiles
from pallas_kernels.paged_decode.triton import paged_decode_triton
from pallas_kernels.paged_prefill.triton import paged_prefill_triton
from pallas_kernels.tuning import Entry

Tiles = PagedTiles | causal.CausalTiles
LONG_CALLS = 4
"""Calls in a chain where one takes long enough to hide the next one's launch."""

# By rows: keys, warps, stages, blocks a core, whether to mask all steps.
PAGED = {
    16: (
        (64, 4, 3, 1, False),
        (64, 4, 3, 1, True),
        (32, 4, 3, 2, False),
        (32, 4, 3, 2, True),
        (64, 4, 2, 2, True),
    ),
    32: ((64, 4, 2, 2, True), (64, 4, 2, 2, False), (64, 8, 3, 1, False), (64, 8, 3, 1, True)),
    64: ((64, 8, 2, 1, False), (64, 8, 2, 1, True)),
}
# Rows, keys, warps, stages.
CAUSAL = (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (128, 32, 8, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
)


def paged_candidates(rows: int) -> list[PagedTiles]:
    """Five to seven for `rows` queries (0: many), of the heights that could serve."""
    if 0 < rows <= 16:
        heights = {16: PAGED[16]}
    elif 0 < rows <= 32:
        heights = {32: PAGED[32], 16: PAGED[16][:2]}
    else:
        heights = {64: PAGED[64], 32: PAGED[32], 16: PAGED[16][:1]}
    return [
        PagedTiles(
            rows=height,
            keys=keys,
            num_warps=warps,
            num_stages=stages,
            blocks_per_core=blocks,
            mask_all=mask_all,
        )
        for height, choices in heights.items()
        for keys, warps, stages, blocks, mask_all in choices
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """`call(tiles)` is a function of `args` whose result is like the first; so many in a chain."""

    call: Callable[[Any], Callable[..., Array]]
    args: tuple[Array, ...]
    calls: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One entry to be: its key, the tiles to try and what to try them on, made when it is time."""

    key: Entry
    default: Tiles
    candidates: Sequence[Tiles]
    workloads: Callable[[], Sequence[Workload]]


def decode_target(
    *,
    heads: int,
    tokens: int,
    page_size: int,
    dtype: str,
    batch: int,
    length: int,
    interpret: bool = False,
) -> Target:
    """Paged decode: a batch that fills the device, and one request; both count as much."""

    def call(tiles: PagedTiles) -> Callable[..., Array]:
        def run(
            q_nope: Array, q_pe: Array, ckv: Array, kpe: Array, table: Array, length: Array
        ) -> Array:
            start = jnp.arange(table.shape[0], dtype=jnp.int32) * table.shape[1]
            return paged_decode_triton(
                *(q_nope, q_pe, ckv, kpe, table.reshape(-1), start, length),
                jnp.float32(DEFAULT_SM_SCALE),
                num_splits=None,
                deterministic=False,
                interpret=interpret,
                tiles=tiles,
            )[0]

        return run

    def workload(batch: int, calls: int) -> Workload:
        shape = PagedShape(
            name="tune", lengths=(length,) * batch, heads=heads, tokens=tokens, page_size=page_size
        )
        return Workload(call=call, args=make_inputs(shape, dtype=dtype).args, calls=calls)

    rows = tokens * heads
    return Target(
        key=_paged_key("paged_decode", heads, rows, page_size, dtype),
        default=default_tiles(rows, dtype),
        candidates=paged_candidates(rows),
        workloads=lambda: [workload(batch, LONG_CALLS), workload(1, CALLS)],
    )


def prefill_target(
    *, heads: int, page_size: int, dtype: str, length: int, interpret: bool = False
) -> Target:
    """Paged prefill of one request: a quarter of its 2 * length positions are new."""
    tokens = max(1, length // 2)

    def call(tiles: PagedTiles) -> Callable[..., Array]:
        def run(*args: Array) -> Array:
            return paged_prefill_triton(
                *args,
                sm_scale=jnp.float32(DEFAULT_SM_SCALE),
                max_count=tokens,
                deterministic=False,
                interpret=interpret,
                tiles=tiles,
            )[0]

        return run

    def workload() -> Workload:
        args = prefill.paged_inputs(
            heads=heads, tokens=tokens, length=2 * length, page_size=page_size, dtype=dtype
        )
        return Workload(call=call, args=args, calls=LONG_CALLS)

    return Target(
        key=_paged_key("paged_prefill", heads, 0, page_size, dtype),
        default=default_tiles(0, dtype),
        candidates=paged_candidates(0),
        workloads=lambda: [workload()],
    )


def causal_target(
    *, dtype: str, length: int, device: Device, heads: int = 16, interpret: bool = False
) -> Target:
    """Causal prefill, forward, of one request of 2 * length positions; heads do not matter."""
    tokens = 2 * length

    def call(tiles: causal.CausalTiles) -> Callable[..., Array]:
        def run(v: Array, q: Array, k: Array, *ranges: Array) -> Array:
            return causal_prefill_triton(
                *(q, k, v, *ranges),
                sm_scale=jnp.float32(DEFAULT_SM_SCALE),
                causal=True,
                interpret=interpret,
                tiles=tiles,
            )[0]

        return run

    def workload() -> Workload:
        q, k, v, _, ranges = prefill.causal_inputs(tokens=tokens, heads=heads, dtype=dtype)
        return Workload(call=call, args=(v, q, k, *ranges), calls=LONG_CALLS)

    width, value_width = prefill.WIDTH, prefill.VALUE_WIDTH
    problem = CausalProblem(
        batch=1,
        tokens=tokens,
        keys=tokens,
        heads=heads,
        width=width,
        value_width=value_width,
        dtype=dtype,
        causal=True,
    )
    return Target(
        key={
            "op": "causal_prefill",
            "width": width,
            "value_width": value_width,
            "dtype": dtype,
        },
        default=causal.default_tiles(problem, device),
        candidates=[
            causal.CausalTiles(rows=rows, keys=keys, num_warps=warps, num_stages=stages)
            for rows, keys, warps, stages in CAUSAL
        ],
        workloads=lambda: [workload()],
    )


def _paged_key(op: str, heads: int, rows: int, page_size: int, dtype: str) -> Entry:
    return {"op": op, "heads": heads, "rows": rows, "page_size": page_size, "dtype": dtype}


def measure(target: Target) -> tuple[Entry, dict[Tiles, str]]:
    """The target's entry, and the tiles that did not run, with the reason.

    us and default_us are geometric means over the workloads. Errors: the default tiles' own.
    """
    workloads = target.workloads()
    tiles = list(dict.fromkeys([target.default, *target.candidates]))

    def compiled(choice: Tiles) -> list[Callable[..., Array]] | Exception:
        try:
            return [
                chained(work.call(choice), work.calls).lower(*work.args).compile()  # pyright: ignore
                for work in workloads
            ]
        except Exception as error:  # the lowering, Triton and XLA have an error class each
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(tiles, pool.map(compiled, tiles), strict=True))

    skipped: dict[Tiles, str] = {}
    programs: dict[Tiles, list[Callable[..., Array]]] = {}
    wanted: list[np.ndarray] = []
    for choice, result in results.items():
        try:
            if isinstance(result, Exception):
                raise result
            got = [_output(p, work.args) for p, work in zip(result, workloads, strict=True)]
        except Exception as error:
            if choice == target.default:
                raise
            skipped[choice] = (str(error) or type(error).__name__).splitlines()[0][:200]
            continue
        wanted = wanted or got  # the default tiles' come first
        error = max(map(relative_error, got, wanted))
        if error < AGREEMENT:
            programs[choice] = result
        else:
            skipped[choice] = f"its output is {error:.1e} away from the default tiles'"

    columns = []
    for index, work in enumerate(workloads):
        bursts = [burst_of(chain[index], *work.args) for chain in programs.values()]
        columns.append([t / work.calls * 1e6 for t in alternating_seconds(bursts)])
    means = map(statistics.geometric_mean, zip(*columns, strict=True))
    micros = dict(zip(programs, means, strict=True))
    best = min(micros, key=lambda choice: micros[choice])
    found = {
        "tiles": dataclasses.asdict(best),
        "us": micros[best],
        "default_us": micros[target.default],
    }
    return {**target.key, **found}, skipped


def _output(program: Callable[..., Array], args: tuple[Array, ...]) -> np.ndarray:
    return np.asarray(jax.block_until_ready(program(*args)), np.float32)
