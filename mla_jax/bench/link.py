"""The link between devices: how long the sum over all of them takes, by its size."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from mla_jax.bench import timing
from mla_jax.bench.meshed import Program, Runs, compile_all, on_parts, random_arrays, struct
from mla_jax.sharding.mesh import MODEL_AXIS, axis_size
from mla_jax.sharding.plan import Link, Message

Row = dict[str, Any]
DTYPE = "bfloat16"
BAR_US = 25.0
"""What a decode step's sum over devices should take at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkSizes:
    """Rows of `dim` numbers: those that decode steps of as many requests sum, and large ones."""

    dim: int = 7168
    decode: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    large: tuple[int, ...] = (1024, 4096, 16384)


def message_of(rows: int, dim: int, devices: int) -> Message:
    """The sum of [rows, dim] over `devices`."""
    size = rows * dim * jnp.dtype(DTYPE).itemsize
    return Message(kind="all-reduce", axis=MODEL_AXIS, devices=devices, count=1, bytes=size)


def sums(mesh: Mesh | AbstractMesh, rows: int, dim: int) -> Program:
    """CALLS sums over all devices, one after the other.

    Each is followed by a product with a number of the device's own: without it, XLA would know that
    the numbers to be summed are equal everywhere, and multiply instead of sending.
    """

    def part(x: Array, state: tuple[()], share: Array) -> tuple[Array, tuple[()]]:
        for _ in range(timing.CALLS):
            x = lax.psum(x, MODEL_AXIS) * share
        return x, state

    # Of each device its own: no device knows the others' numbers.
    devices = axis_size(mesh, MODEL_AXIS)
    x = struct(mesh, (devices * rows, dim), DTYPE, MODEL_AXIS)
    share = struct(mesh, (devices,), DTYPE, MODEL_AXIS)
    return Program(mesh=mesh, function=on_parts(part, x, (), share), args=(x, (), share))


def messages_in(program: str) -> int:
    """How many sums over devices a compiled program's text has."""
    return len(re.findall(r" all-reduce(?:-start)?\(", program))


def measure_link(mesh: Mesh, sizes: LinkSizes) -> tuple[list[Row], Link]:
    """A row a size, and what they come to: the smallest's time, the largest bytes a second.

    gb_s counts what a device sends around a ring (`Message.sent`), whatever way it really takes.
    Errors: RuntimeError where a compiled program sends fewer messages than it was written with.
    """
    devices = axis_size(mesh, MODEL_AXIS)
    every = (*sizes.decode, *sizes.large)
    programs = [sums(mesh, count, sizes.dim) for count in every]
    rows = []
    for count, program, run in zip(every, programs, compile_all(programs), strict=True):
        if (sent := messages_in(run.as_text())) < timing.CALLS:
            raise RuntimeError(f"link: a program of {timing.CALLS} sums sends {sent} messages")
        x, state, share = program.args
        own = random_arrays(share, 1, lambda shape: devices**-0.5)
        [seconds] = timing.alternating_seconds([Runs(run, random_arrays(x, 0), state, own).burst])
        message, seconds = message_of(count, sizes.dim, devices), seconds / timing.CALLS
        row = {
            "op": "all_reduce",
            "shape": f"{count}x{sizes.dim}",
            "dtype": DTYPE,
            "devices": devices,
            "bytes": message.bytes,
            "ours_us": seconds * 1e6,
            "gb_s": message.sent() / seconds / 1e9,
        }
        rows.append(row | ({"bar_us": BAR_US} if count in sizes.decode else {}))
    latency = min(row["ours_us"] for row in rows)
    return rows, Link(gb_per_s=max(row["gb_s"] for row in rows), latency_us=latency)
