"""How a time is counted: many calls in one compiled program, bursts, the median."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

CALLS = 20
ROUNDS = 5
BURST_SECONDS = 0.02

Burst = Callable[[int], None]
"""Queues that many runs of a program, then waits until they are done."""


def chained(fn: Callable[..., Array], calls: int = CALLS) -> Callable[..., Array]:
    """A jitted program of `calls` calls, each of which consumes the previous one's result.

    fn(x, *rest) must return an array of x's shape and dtype.
    """
    call = jax.jit(fn)  # traced and lowered once for all calls; XLA puts it in line

    def program(x: Array, *rest: Any) -> Array:
        for _ in range(calls):
            x = call(x, *rest)
        return x

    return jax.jit(program)


def seconds_a_run(program: Callable[..., Any], *args: Any, burst: int = 5) -> float:
    """Median over ROUNDS bursts of a run's seconds, after warming up; runs are queued."""
    jax.block_until_ready(program(*args))
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        results = [program(*args) for _ in range(burst)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - begin) / burst)
    return statistics.median(rounds)


def microseconds_a_call(fn: Callable[..., Array], x: Array, *rest: Any) -> float:
    """Device time of one call of `fn` within a chain of CALLS."""
    return seconds_a_run(chained(fn), x, *rest) / CALLS * 1e6


def burst_of(program: Callable[..., Any], *args: Any) -> Burst:
    """Bursts of a jitted program's runs."""

    def burst(runs: int) -> None:
        jax.block_until_ready([program(*args) for _ in range(runs)])

    return burst


def alternating_seconds(bursts: Sequence[Burst]) -> list[float]:
    """Median over ROUNDS of each program's seconds a run, after warming up.

    Bursts take turns, so that clocks and heat are the same for all; each lasts about BURST_SECONDS.
    """
    counts = []
    for burst in bursts:
        burst(1)
        begin = time.perf_counter()
        burst(2)
        counts.append(max(1, math.ceil(2 * BURST_SECONDS / (time.perf_counter() - begin))))
    rounds = []
    for _ in range(ROUNDS):
        seconds = []
        for burst, count in zip(bursts, counts, strict=True):
            begin = time.perf_counter()
            burst(count)
            seconds.append((time.perf_counter() - begin) / count)
        rounds.append(seconds)
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def compilations(jitted: Callable[..., Any]) -> int:
    """How many programs a jitted function has made so far."""
    return jitted._cache_size()  # pyright: ignore[reportFunctionMemberAccess]


def rates(moved: int, flops: int, micros: float, ceilings: dict[str, float]) -> dict[str, float]:
    """How fast `moved` bytes and `flops` operations were in `micros`, and beside the ceilings.

    times_floor counts the slower of the two at its ceiling.
    """
    gb_s, tflop_s = moved / micros / 1e3, flops / micros / 1e6
    of_bandwidth = gb_s / ceilings["bandwidth_gb_s"]
    of_matmul = tflop_s / ceilings["matmul_tflop_s"]
    return {
        "gb_s": gb_s,
        "tflop_s": tflop_s,
        "of_bandwidth": of_bandwidth,
        "of_matmul": of_matmul,
        "times_floor": 1 / max(of_bandwidth, of_matmul),
    }


def measure_ceilings() -> dict[str, float]:
    """This device's own limits, now: GB/s copied (read + write) and read, bfloat16 TFLOP/s.

    `bandwidth_gb_s` is the better of the two: what floors are counted with.
    """
    source = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    copy = 2 * source.nbytes / seconds_a_run(jax.jit(jnp.copy), source, burst=8) / 1e9
    read_sum = jax.jit(lambda x: x.astype(jnp.float32).sum())
    read = source.nbytes / seconds_a_run(read_sum, source, burst=8) / 1e9
    side = 8192
    matrix = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    scale = jnp.asarray(side**-0.5, jnp.bfloat16)
    product = chained(lambda x, m: (x @ m) * scale, 4)
    matmul_seconds = seconds_a_run(product, matrix, matrix) / 4
    return {
        "copy_gb_s": copy,
        "read_gb_s": read,
        "bandwidth_gb_s": max(copy, read),
        "matmul_tflop_s": 2 * side**3 / matmul_seconds / 1e12,
    }
