"""Tables of measured tiles: which file, which entry, and what a choice does with them."""

import dataclasses
import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.tiles import (
    PagedProblem,
    choose_tiles,
    choose_workers,
    default_tiles,
)
from pallas_kernels.tuning import read_table, record, table_name, tuned

DEVICE = Device(platform="gpu", kind="Some GPU", num_cores=100)
MEASURED = dataclasses.replace(default_tiles(16, "bfloat16"), keys=16, num_warps=8)
TILES = dataclasses.asdict(MEASURED)
KEY = {"heads": 16, "rows": 16, "page_size": 64, "dtype": "bfloat16"}
ENTRY = {"op": "paged_decode", **KEY, "tiles": TILES, "us": 3.0, "default_us": 4.0}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The table of DEVICE, in a folder of the test's own."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._table.cache_clear()
    yield tmp_path / "some_gpu.json"
    tuning._table.cache_clear()


def problem(**changes) -> PagedProblem:
    sizes = {"batch": 3, "tokens": 1, "heads": 16, "latent": 512, "rope": 64, "page_size": 64}
    rest = {"op": "paged_decode", "dtype": "bfloat16", "num_ids": 100}
    return PagedProblem(**{**sizes, **rest, **changes})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "nvidia_h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb.json"),
        ("cpu", "cpu.json"),
        (" Odd (TM)! ", "odd_tm.json"),
    ],
)
def test_table_name(kind, name):
    assert table_name(kind) == name


def test_no_table(path):
    assert read_table(path) == []
    assert tuned("paged_decode", DEVICE, **KEY) is None


def test_entry_of_exactly_the_key(path):
    record(path, ENTRY, {})
    assert tuned("paged_decode", DEVICE, **KEY) == TILES
    assert tuned("paged_prefill", DEVICE, **KEY) is None
    for name, value in {"heads": 8, "rows": 0, "page_size": 1, "dtype": "float32"}.items():
        assert tuned("paged_decode", DEVICE, **{**KEY, name: value}) is None
    other = Device(platform="gpu", kind="Some other GPU", num_cores=100)
    assert tuned("paged_decode", other, **KEY) is None


def test_record_replaces_the_entry_of_its_key(path):
    other = {**ENTRY, "heads": 8}
    better = {**ENTRY, "tiles": {**TILES, "keys": 32}, "us": 2.0}
    for entry in (ENTRY, other, better):
        record(path, entry, {"device": "Some GPU"})
    assert json.loads(path.read_text()) == {"device": "Some GPU", "entries": [other, better]}
    assert tuned("paged_decode", DEVICE, **KEY) == {**TILES, "keys": 32}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_no_table_in_the_file(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match="got a file that holds no table, expected JSON entries"):
        read_table(path)


def test_choose_tiles(path):
    """Measured ones where there are any; the batch, the lengths and the widths do not matter."""
    assert choose_tiles(problem(), DEVICE) == default_tiles(16, "bfloat16") != MEASURED
    record(path, ENTRY, {})
    for changes in ({}, {"batch": 1}, {"num_ids": 9}):
        assert choose_tiles(problem(**changes), DEVICE) == MEASURED
    # Two tokens make 32 rows, which nobody measured.
    assert choose_tiles(problem(tokens=2), DEVICE) == default_tiles(32, "bfloat16")


def test_workers_fill_the_device():
    tiles = dataclasses.replace(MEASURED, blocks_per_core=2)
    assert choose_workers(tiles, DEVICE, 1) == 200
    assert choose_workers(tiles, DEVICE, 8) == 25
    assert choose_workers(tiles, DEVICE, 300) == 1
    unknown = Device(platform="cpu", kind="cpu", num_cores=None)
    assert choose_workers(tiles, unknown, 1) > 0
