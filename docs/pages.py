"""Pages that are made when the documentation is: what runs where, and what was measured."""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels
from mla_jax.bench import report
from mla_jax.cli.doctor import diagnose
from mla_jax.config import presets
from pallas_kernels import paged_decode
from pallas_kernels.backend import KNOWN, Backend, explain
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import PagedProblem

CPU = Device(platform="cpu", kind="cpu", num_cores=None)
A100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", num_cores=108)
H200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132)


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
    parts = [
        "## Operations and backends",
        operations_table().markdown(),
        "## What is chosen",
        "What a call gets that names no backend:",
        choices_table().markdown(),
        "## Paged decode in detail",
        "On an H200; a reason is the one that a call by that name raises:",
        paged_table().markdown(),
        f"Asked with jax {jax.__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def performance() -> str:
    """A section for each results file that comes with the package."""
    return "\n".join(report.markdown(name, report.read(name)) for name in report.names())


def write(folder: Path) -> None:
    """The pages' texts, for MyST to include."""
    folder.mkdir(exist_ok=True)
    for make in (support, performance):
        (folder / f"{make.__name__}.md").write_text(make())
