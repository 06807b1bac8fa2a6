"""How a time is counted: many calls in one compiled program, bursts, the median."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

CALLS = 20
ROUNDS = 5


def chained(fn: Callable[..., Array], calls: int = CALLS) -> Callable[..., Array]:
    """A jitted program of `calls` calls, each of which consumes the previous one's result.

    fn(x, *rest) must return an array of x's shape and dtype.
    """

    def program(x: Array, *rest: Any) -> Array:
        for _ in range(calls):
            x = fn(x, *rest)
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


def compilations(jitted: Callable[..., Any]) -> int:
    """How many programs a jitted function has made so far."""
    return jitted._cache_size()  # pyright: ignore[reportFunctionMemberAccess]


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
