"""Pages that are made when the documentation is: what runs where, and what was measured."""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels
from mla_jax.bench import report
from mla_jax.cli.doctor import diagnose
from mla_jax.config import presets
from mla_jax.sharding.estimate import Machine, Step, rank_meshes
from mla_jax.sharding.plan import Link
from pallas_kernels import paged_decode
from pallas_kernels.backend import KNOWN, Backend, explain
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import PagedProblem

# Pages that an older jax makes say what this one can do.
MEASURED_ON = (0, 11, 2)
CPU = Device(platform="cpu", kind="cpu", num_cores=None)
A100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", num_cores=108)
H200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132)

# NVLink 4: 900 GB/s, both directions together. Nobody states a message's latency: assumed.
VENDORS_LINK = Link(gb_per_s=450, latency_us=10)
NETWORK = Link(gb_per_s=50, latency_us=20)
MEMORY_GB, USABLE = 141, 0.9
GPUS = (8, 16, 64, 992, 1000)
ROWS_A_GPU, CACHED = (1, 2, 4, 8, 16, 32, 64, 128), 4096


def operations() -> Iterator[tuple[str, Sequence[Backend]]]:
    """Every package of kernels that has backends."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg:
            package = importlib.import_module(f"pallas_kernels.{module.name}")
            if backends := getattr(package, "BACKENDS", None):
                yield module.name, backends


def place(backend: Backend | None) -> str:
    """Where a backend runs, shapes and dtypes aside."""
    if backend is None:
        return "–"
    if backend.unfit(CPU) is None:
        return "every device"
    if backend.unfit(A100) is None:
        return "NVIDIA GPUs"
    return backend.unfit(H200) or "Hopper"


def operations_table() -> report.Table:
    """Operation by backend: where it runs."""
    rows = []
    for op, backends in operations():
        by_name = {backend.name: backend for backend in backends}
        rows.append((op, *(place(by_name.get(name)) for name in KNOWN)))
    return report.Table(columns=("operation", *KNOWN), rows=tuple(rows))


def _problem(**changes: Any) -> PagedProblem:
    usual: dict[str, Any] = {"batch": 32, "tokens": 1, "heads": 128, "latent": 512, "rope": 64}
    usual |= {"op": "paged_decode", "page_size": 64, "dtype": "bfloat16", "num_ids": 2048}
    return PagedProblem(**usual | changes)


def paged_table() -> report.Table:
    """Paged decode on an H200: each change to DeepSeek's sizes, and who takes it."""
    changes: dict[str, dict[str, Any]] = {"DeepSeek's sizes, bfloat16, pages of 64": {}}
    changes |= {f"dtype {dtype}": {"dtype": dtype} for dtype in ("float16", "float32")}
    changes |= {
        f"a float8_e4m3fn cache, scales by {by}": {"scaled": by} for by in ("slot", "tensor")
    }
    changes |= {f"pages of {size}": {"page_size": size} for size in (1, 16, 48, 256)}
    changes |= {f"{heads} heads": {"heads": heads} for heads in (3, 16)}
    changes |= {"8 query tokens": {"tokens": 8}}
    changes |= {f"latent {width}": {"latent": width} for width in (64, 128, 384)}
    changes |= {f"rope {width}": {"rope": width} for width in (0, 32)}
    names, rows = [backend.name for backend in paged_decode.BACKENDS], []
    for what, change in changes.items():
        reasons = explain(paged_decode.BACKENDS, _problem(**change), H200)
        rows.append((what, *(reasons[name] or "yes" for name in names)))
    return report.Table(columns=("", *names), rows=tuple(rows))


def choices_table() -> report.Table:
    """What a call that names no backend gets, by model and device."""
    columns, rows = [], []
    for preset in presets:
        for device in (H200, A100, CPU):
            abstract = AbstractDevice(device.kind, device.num_cores, device.platform)
            with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
                found = diagnose(preset, 64)["operations"]
            columns += [op for op in found if op not in columns]
            rows.append((f"{preset}, {device.kind}", {op: found[op]["runs"] for op in found}))
    cells = ((name, *(runs.get(op, "–") for op in columns)) for name, runs in rows)
    return report.Table(columns=("model, device", *columns), rows=tuple(cells))


def support() -> str:
    """The support matrix, from what the backends themselves say."""
    asked = max(jax.__version_info__, MEASURED_ON)
    with mock.patch.object(jax, "__version_info__", asked):
        parts = [
            "## Operations and backends",
            operations_table().markdown(),
            "## What is chosen",
            "What a call of one request gets that names no backend (on Hopper more than eight "
            "requests of 16 heads get `mosaic_gpu` too):",
            choices_table().markdown(),
            "## Paged decode in detail",
            "On an H200; a reason is the one that a call by that name raises:",
            paged_table().markdown(),
        ]
    version = ".".join(map(str, asked))
    parts.append(f"Asked as with jax {version}; before 0.11 there is no `mosaic_gpu`.")
    return "\n\n".join(parts) + "\n"


def performance() -> str:
    """A section for each results file that comes with the package."""
    return "\n".join(report.markdown(name, report.read(name)) for name in report.names())


def measured_link() -> tuple[Link, str] | None:
    """The link of the largest mesh that results have, and their file's name."""
    documents = {name: report.read(name) for name in report.names()}
    found = {name: each for name, each in documents.items() if "link" in each}
    if not found:
        return None
    name = max(found, key=lambda name: found[name]["devices"])
    return Link(**found[name]["link"]), name


def machine() -> tuple[Machine, list[str]]:
    """An H200 with its links, and where each of these numbers comes from."""
    rates = report.read("paged_decode_h200")["ceilings"]
    measured = measured_link()
    link, source = measured or (VENDORS_LINK, "")
    speed = f"{link.gb_per_s:,.0f} GB/s a direction and {link.latency_us:,.1f} µs a message"
    one = Machine(
        memory_gb=MEMORY_GB * USABLE,
        bandwidth_gb_s=rates["bandwidth_gb_s"],
        tflop_s=rates["matmul_tflop_s"],
        link=link,
        network=NETWORK,
    )
    return one, [
        f"memory {one.bandwidth_gb_s:,.0f} GB/s and products {one.tflop_s:,.0f} TFLOP/s: measured "
        "(`paged_decode_h200`);",
        f"link within a node of {one.node}: {speed}, "
        + (f"measured (`{source}`);" if measured else "NVIDIA's figure and an assumption;"),
        f"network between nodes: {NETWORK.gb_per_s:,.0f} GB/s a direction for each GPU and "
        f"{NETWORK.latency_us:,.0f} µs, the figure of a 400 Gb/s adapter and an assumption;",
        f"{USABLE:.0%} of the {MEMORY_GB} GB that NVIDIA states can be used: an assumption.",
    ]


def best_step(one: Machine, devices: int, fp8: bool) -> Step:
    """DeepSeek-V3's mesh and batch of most tokens a second; of the least memory if none fits."""
    steps = [
        step
        for rows in ROWS_A_GPU
        for step in rank_meshes(
            presets["deepseek-v3"],
            one,
            devices=devices,
            batch=rows * devices,
            tokens=CACHED,
            dtype="fp8" if fp8 else None,
        )
    ]
    fitting = [step for step in steps if step.fits]
    if fitting:
        return max(fitting, key=lambda step: step.tokens_per_s)
    return min(steps, key=lambda step: step.device_bytes)


def mesh_row(one: Machine, devices: int, fp8: bool) -> tuple[str, ...]:
    """The best step of so many devices; or how far the smallest is from fitting."""
    best = best_step(one, devices, fp8)
    sizes = {"data": best.data, "context": best.context, "model": best.model}
    mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    held = f"{best.plan.weight_bytes / 1e9:.0f} + {best.plan.cache_bytes / 1e9:.0f}"
    label = f"{devices:,}, {'FP8' if fp8 else 'bfloat16'}"
    if not best.fits:
        return (label, f"none fits; least: {mesh}", f"{best.batch:,}", held, *("–",) * 7)
    arithmetic = best.product_seconds + best.attention_seconds
    parts = (best.weight_seconds, best.cache_seconds, arithmetic, best.message_seconds)
    times = (f"{seconds * 1e3:.1f}" for seconds in (*parts, best.seconds))
    speed = f"{best.tokens_per_s:,.0f}"
    return (label, mesh, f"{best.batch:,}", held, *times, best.bound, speed)


def meshes_table(one: Machine) -> report.Table:
    """DeepSeek-V3 by number of GPUs and format of the weights."""
    columns = ("GPUs, weights", "mesh", "requests", "GB a GPU, weights + cache", "weights, ms")
    columns += ("cache, ms", "arithmetic, ms", "messages, ms", "step, ms", "bound by", "tokens/s")
    every = [mesh_row(one, devices, fp8) for devices in GPUS for fp8 in (False, True)]
    return report.Table(columns=columns, rows=tuple(every))


def meshes() -> str:
    """DeepSeek-V3 on paper, with what it was computed from."""
    one, sources = machine()
    parts = [
        f"DeepSeek-V3 (671 billion parameters) on H200, {CACHED:,} cached tokens a request: of all "
        f"meshes that fit, with {ROWS_A_GPU[0]} to {ROWS_A_GPU[-1]} requests a GPU in powers of "
        "two, the one of most tokens a second. Computed by `mla_jax.sharding.estimate`, not "
        "measured: real kernels take longer.",
        meshes_table(one).markdown(),
        "From:",
        "\n".join(f"- {source}" for source in sources),
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> None:
    """The pages' texts, for MyST to include."""
    folder.mkdir(exist_ok=True)
    for make in (support, performance, meshes):
        (folder / f"{make.__name__}.md").write_text(make())
