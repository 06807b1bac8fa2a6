"""Many devices beside one: attention by heads, attention by context, whole decode steps.

Every comparison is made in turns within one process. ratio is the peer's time over ours:

    heads     the share of DeepSeek-V3's heads that a device has, alone on one device: what is lost
              to the mesh; and all heads on one device: what is won by it
    context   the same cache on one device
    steps     DeepSeek-V2-Lite with random weights, of which each mesh has all

A row's floor is counted with the bandwidth, the matrix rate and the link of the same run.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mla_jax.bench import timing
from mla_jax.bench.link import DTYPE, LinkSizes, measure_link, message_of
from mla_jax.bench.meshed import Runs, compile_all, random_weights
from mla_jax.bench.paged import PagedShape, backend_for
from mla_jax.bench.sharded_programs import (
    attention_by_context,
    attention_by_heads,
    block_of_steps,
    context_runs,
    kernel_runs,
    layer_by_heads,
    layer_runs,
    step_runs,
)
from mla_jax.config import MLAConfig, ModelConfig, presets
from mla_jax.generate import BLOCK_STEPS
from mla_jax.sharding import make_mesh
from mla_jax.sharding.estimate import Machine, estimate_step
from mla_jax.sharding.mesh import CONTEXT_AXIS, MODEL_AXIS
from mla_jax.sharding.plan import Link, Message

Row = dict[str, Any]

KERNEL_BAR, LAYER_BAR, CONTEXT_BAR = 0.9, 0.8, 0.7
"""The ratios to reach; of context, for each device: 2.8 of 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the defaults are DeepSeek's."""

    link: LinkSizes = dataclasses.field(default_factory=LinkSizes)
    layer: MLAConfig = presets["deepseek-v3"].mla
    batch: int = 128
    length: int = 4096
    contexts: tuple[int, ...] = (131_072, 1_048_576)
    model: ModelConfig = presets["deepseek-v2-lite"]
    step_batches: tuple[int, ...] = (32, 128)
    step_length: int = 1024


SIZES = Sizes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What floors are counted with: `timing.measure_ceilings`, and the link of all devices."""

    ceilings: dict[str, float]
    link: Link

    def seconds(self, moved: float, flops: float) -> float:
        moving = moved / self.ceilings["bandwidth_gb_s"] / 1e9
        return max(moving, flops / self.ceilings["matmul_tflop_s"] / 1e12)


def first_devices(count: int, axis: str = MODEL_AXIS) -> Mesh:
    """A mesh of the first devices, all of them on one axis."""
    return make_mesh(**{axis: count}, devices=jax.devices()[:count])  # pyright: ignore[reportArgumentType]


def by_heads(count: int, sizes: Sizes, rates: Rates) -> Iterator[Row]:
    """The kernel beside a device's share of it; the layer beside that, and beside all of it."""
    layer, batch, length = sizes.layer, sizes.batch, sizes.length
    share = dataclasses.replace(layer, n_heads=layer.n_heads // count)
    many, one = first_devices(count), first_devices(1)
    kernels = [
        attention_by_heads(mesh, heads, batch, length)
        for mesh, heads in ((many, layer.n_heads), (one, share.n_heads))
    ]
    layers = [
        layer_by_heads(mesh, config, batch, length)
        for mesh, config in ((many, layer), (one, share), (one, layer))
    ]
    compiled = compile_all([*kernels, *layers])
    shape = PagedShape(name="", lengths=(length,) * batch, heads=share.n_heads)
    floor = rates.seconds(shape.moved, shape.flops)
    row = {
        "op": "sharded_attention",
        "shape": f"B{batch}-h{layer.n_heads}-s{length}",
        "dtype": DTYPE,
        "backend": backend_for(shape, None),
        "devices": count,
        "mesh": f"{MODEL_AXIS}={count}",
        "floor_us": floor * 1e6,
    }
    less = f"one device, {share.n_heads} heads"
    pairs = zip(kernels, compiled[:2], strict=True)
    times = micros([kernel_runs(*pair, length) for pair in pairs])
    yield compared(row, times[0], less, times[1]) | {"bar": KERNEL_BAR}

    weights = jax.tree.leaves(layers[1].args[2][0])
    values = sum(leaf.size for leaf in weights)
    floor += rates.seconds(values * jnp.dtype(DTYPE).itemsize, 2 * batch * values)
    floor += message_of(batch, layer.dim, count).seconds(rates.link)
    row |= {"op": "sharded_layer", "floor_us": floor * 1e6}
    pairs = zip(layers, compiled[2:], strict=True)
    times = micros([layer_runs(*pair, length) for pair in pairs])
    yield compared(row, times[0], less, times[1]) | {"bar": LAYER_BAR}
    yield compared(row, times[0], f"one device, {layer.n_heads} heads", times[2])


def by_context(count: int, sizes: Sizes, rates: Rates) -> Iterator[Row]:
    """One request's attention over the cache of all devices, beside all of it on one."""
    layer, meshes = sizes.layer, (first_devices(count, CONTEXT_AXIS), first_devices(1))
    programs = [
        attention_by_context(mesh, layer, length) for length in sizes.contexts for mesh in meshes
    ]
    compiled = compile_all(programs)
    size = layer.n_heads * (layer.v_head_dim * jnp.dtype(DTYPE).itemsize + 4)
    merge = Message(kind="all-gather", axis=CONTEXT_AXIS, devices=count, count=1, bytes=size)
    for i, length in enumerate(sizes.contexts):
        shape = PagedShape(name="", lengths=(-(-length // count),), heads=layer.n_heads)
        floor = rates.seconds(shape.moved, shape.flops) + merge.seconds(rates.link)
        row = {
            "op": "sharded_context",
            "shape": f"B1-h{layer.n_heads}-s{length}",
            "dtype": DTYPE,
            "backend": backend_for(shape, None),
            "devices": count,
            "mesh": f"{CONTEXT_AXIS}={count}",
            "floor_us": floor * 1e6,
        }
        pair = slice(2 * i, 2 * i + 2)
        runs = zip(programs[pair], compiled[pair], strict=True)
        times = micros([context_runs(*one, length) for one in runs])
        yield compared(row, times[0], "one device", times[1]) | {"bar": CONTEXT_BAR * count}


def by_steps(count: int, sizes: Sizes, rates: Rates) -> Iterator[Row]:
    """Steps of the whole model on 1, 2, 4 … devices; efficiency is speed-up over devices."""
    config, length = sizes.model, sizes.step_length
    counts = [1 << i for i in range(count.bit_length())]
    meshes = {devices: first_devices(devices) for devices in counts}
    programs = [
        block_of_steps(mesh, config, batch, length)
        for mesh in meshes.values()
        for batch in sizes.step_batches
    ]
    pairs = zip(programs, compile_all(programs), strict=True)
    machine = Machine(
        memory_gb=math.inf,
        bandwidth_gb_s=rates.ceilings["bandwidth_gb_s"],
        tflop_s=rates.ceilings["matmul_tflop_s"],
        link=rates.link,
    )
    alone: dict[int, float] = {}
    for devices in counts:
        model = None  # one mesh's weights at a time
        for batch in sizes.step_batches:
            program, run = next(pairs)
            model = model or random_weights(program.args[2][0], 1)
            [seconds] = timing.alternating_seconds([step_runs(program, run, model, length).burst])
            seconds /= BLOCK_STEPS
            speedup = alone.setdefault(batch, seconds) / seconds
            cached = length + BLOCK_STEPS // 2
            floor = estimate_step(config, machine, batch=batch, tokens=cached, model=devices)
            yield {
                "op": "sharded_step",
                "shape": f"B{batch}-s{length}",
                "dtype": config.dtype,
                "devices": devices,
                "mesh": f"{MODEL_AXIS}={devices}",
                "ms_a_step": seconds * 1e3,
                "tokens_s": batch / seconds,
                "speedup": speedup,
                "efficiency": speedup / devices,
                "floor_ms": floor.seconds * 1e3,
                "times_floor": seconds / floor.seconds,
            }


def micros(runs: list[Runs]) -> list[float]:
    """Microseconds a call of each, in turns."""
    return [
        seconds / timing.CALLS * 1e6
        for seconds in timing.alternating_seconds([r.burst for r in runs])
    ]


def compared(row: Row, ours: float, peer: str, peers: float) -> Row:
    times = {"ours_us": ours, "peer": peer, "peer_us": peers, "ratio": peers / ours}
    return row | times | {"times_floor": ours / row["floor_us"]}


PARTS = {"heads": by_heads, "context": by_context, "steps": by_steps}
NAMES = ("link", *PARTS)


def find_parts(names: list[str] | None) -> list[str]:
    """The named parts; None is all. Errors: ValueError, listing the names."""
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"only: got {name!r}, expected some of {', '.join(NAMES)}")
    return list(NAMES) if names is None else names


def usable_devices() -> int:
    """The greatest power of two of the devices there are. Errors: ValueError for fewer than two."""
    found = jax.device_count()
    if found < 2:
        raise ValueError(f"devices: got {found}, expected at least 2")
    return 1 << (found.bit_length() - 1)


def prepare() -> tuple[int, Rates, list[Row]]:
    """What every part needs: how many devices, and their rates; with the rows of the link."""
    count = usable_devices()
    ceilings = timing.measure_ceilings()
    rows, link = measure_link(first_devices(count), SIZES.link)
    return count, Rates(ceilings=ceilings, link=link), rows


def run(parts: list[str], count: int, rates: Rates, link: list[Row]) -> list[Iterable[Row]]:
    """The rows of each part, measured when they are asked for, but for the link's."""
    return [link if part == "link" else PARTS[part](count, SIZES, rates) for part in parts]
