"""The documentation's tables: of support, and of meshes from the estimate and what is measured."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from mla_jax import presets
from mla_jax.bench import report
from mla_jax.sharding.estimate import estimate_step
from mla_jax.sharding.plan import Link

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_support_is_that_of_the_jax_measured_on(pages):
    """Whichever version makes the pages."""
    text = pages.support()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert lines["deepseek-v3, NVIDIA H200"].count("mosaic_gpu") == 1
    assert "mosaic_gpu" not in lines["deepseek-v3, NVIDIA A100-SXM4-80GB"]
    assert lines["DeepSeek's sizes, bfloat16, pages of 64"].endswith("| yes | yes | yes |")
    assert "Mosaic GPU's copies and its interpreter need" not in text


def test_rows_are_estimates(pages, monkeypatch):
    """The mesh and batch that a row names give its numbers, and no other mesh is faster."""
    monkeypatch.setattr(pages, "GPUS", (8, 1000))
    one, _ = pages.machine()
    rows = {row[0]: row for row in pages.meshes_table(one).rows}
    assert list(rows) == ["8, bfloat16", "8, FP8", "1,000, bfloat16", "1,000, FP8"]
    assert rows["8, bfloat16"][1].startswith("none fits")
    for label, devices in (("8, FP8", 8), ("1,000, FP8", 1000)):
        _, mesh, batch, held, *times, bound, speed = rows[label]
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(", "))}
        rest = {"batch": int(batch.replace(",", "")), "tokens": 4096, "dtype": "fp8"}
        step = estimate_step(presets["deepseek-v3"], one, **sizes, **rest)
        assert step.plan.devices == devices
        assert step.fits
        assert held == f"{step.plan.weight_bytes / 1e9:.0f} + {step.plan.cache_bytes / 1e9:.0f}"
        assert float(times[-1]) == pytest.approx(step.seconds * 1e3, abs=0.05)
        parts = [float(part) for part in times[:-1]]
        arithmetic = step.parts["products"] + step.parts["attention"]
        wanted = (step.parts["weights"], step.parts["cache"], arithmetic, step.parts["messages"])
        assert parts == pytest.approx([part * 1e3 for part in wanted], abs=0.05)
        assert (bound, speed) == (step.bound, f"{step.tokens_per_s:,.0f}")
    for rows_a_gpu in pages.ROWS_A_GPU:
        for context, model in ((1, 8), (2, 4), (8, 1), (1, 2)):
            sizes = {"data": 8 // context // model, "context": context, "model": model}
            rest = {"batch": 8 * rows_a_gpu, "tokens": 4096, "dtype": "fp8"}
            other = estimate_step(presets["deepseek-v3"], one, **sizes, **rest)
            best = int(rows["8, FP8"][-1].replace(",", ""))
            assert not other.fits or other.tokens_per_s <= best + 1


def test_a_measured_link_takes_the_vendors_place(pages, monkeypatch, tmp_path):
    for path in report.FOLDER.glob("*_h200.json"):
        if not path.stem.startswith("sharded"):
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    one, sources = pages.machine()
    assert one.link == pages.VENDORS_LINK
    assert "450 GB/s a direction and 10.0 µs a message, NVIDIA's figure" in sources[1]
    rates = report.read("paged_decode_h200")["ceilings"]
    assert one.bandwidth_gb_s == rates["bandwidth_gb_s"]
    header = {"command": "x", "versions": {}, "python": "3", "device": "a GPU", "commit": "c"}
    for devices, speed in ((2, 111.0), (4, 222.0)):
        measured = {"devices": devices, "link": {"gb_per_s": speed, "latency_us": 7.5}, "rows": []}
        (tmp_path / f"sharded_x{devices}.json").write_text(json.dumps(header | measured))
    one, sources = pages.machine()
    assert one.link == Link(gb_per_s=222, latency_us=7.5)
    assert "222 GB/s a direction and 7.5 µs a message, measured (`sharded_x4`)" in sources[1]
