"""Results files as tables, and what a benchmark leaves when it is interrupted."""

import functools
import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mla_jax.bench import decode_step, report, schedules, timing
from mla_jax.cli.main import main

README = Path(__file__).parents[2] / "README.md"
ROW = {
    "op": "paged_decode",
    "shape": "B2-h16-s4096",
    "dtype": "bfloat16",
    "backend": "triton",
    "ours_us": 1250.0,
    "peer": "flash-mla",
    "peer_us": 1000.0,
    "ratio": 0.8,
    "times_floor": 1.234,
}
FIELDS = {"command": "x", "versions": {}, "python": "3", "device": "a GPU", "commit": "c" * 40}


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return FIELDS | {"rows": list(rows)}


def test_the_readme_says_what_the_files_say():
    """As it stands; and a number that somebody changed comes back."""
    text = README.read_text()
    assert report.updated(text) == text
    link = text.index("bench/results/paged_decode_h200.json")
    rows = list(re.finditer(r"^\| \d.*\d \|$", text[link:], re.MULTILINE))
    assert len(rows) > 15
    for row in (rows[0], rows[15]):
        digit = link + row.end() - 3
        wrong = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
        assert report.updated(wrong) == text


def test_rows_that_are_not_there():
    text = README.read_text()
    with pytest.raises(ValueError, match=r"^line \d+: '9 × 9, 9' is in 0 rows of results$"):
        report.updated(text.replace("| 128 × 128, 8,192 |", "| 9 × 9, 9 |"))


def test_other_tables_are_left():
    table = "| batch | ms a step | tokens/s | floor, ms | times the floor |\n|---|\n| 1 | 2 |"
    assert report.updated(table) == table  # no file was linked to
    other = "[r](bench/results/decode_step_h200.json)\n\n| batch | ms |\n|---|---|\n| 1 | 2 |"
    assert report.updated(other) == other


@pytest.mark.parametrize("name", report.names())
def test_shipped_files(name):
    """Each row of a file is in its tables; first cells are alone of their kind where they lead."""
    found = report.read(name)
    tables = [table for made in report.tables(found).values() for table in made]
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    for row in found["rows"]:
        if row["op"] == "paged_decode" and "times_floor" in row:
            label = report.paged_label(row["shape"])
            time = f"{row['ours_us']:,.1f}"
            assert any(r[0].startswith(label) and r[2] == time for t in tables for r in t.rows)
    text = report.markdown(name, found)
    assert found["device"] in text
    assert found["command"] in text
    assert text.count("\n| ") == sum(len(table.rows) + 1 for table in tables)


def test_numbers_of_a_row():
    modes = ({}, {"deterministic": True}, {"dtype": "float16"})
    (table,) = report.tables(document(*(ROW | mode for mode in modes)))["paged_decode"]
    assert table.columns[3] == "FlashMLA, µs"
    assert table.rows[0] == ("2 × 16, 4,096", "`triton`", "1,250.0", "1,000.0", "0.80", "1.23")
    assert [row[0] for row in table.rows[1:]] == [
        "2 × 16, 4,096, deterministic",
        "2 × 16, 4,096, float16",
    ]
    steps = {"op": "decode_step", "shape": "B32 s9", "ms_a_step": 9.136, "tokens_s": 3500.4}
    steps |= {"floor_ms": 8.006, "times_floor": 1.1411}
    (table,) = report.tables(document(steps))["decode_step"]
    assert table.rows == (("32", "9.14", "3,500", "8.01", "1.14"),)
    prefill = {"op": "causal_prefill", "shape": "h16-t8192", "ours_us": 10.0}
    rows = [
        prefill | {"peer": peer, "peer_us": micros, "ratio": micros / 10, "tflop_s": rate}
        for peer, micros, rate in (("cudnn", 9.04, 443.4), ("xla", 73.4, 424.2))
    ]
    (table,) = report.tables(document(*rows))["causal_prefill"]
    assert table.rows == (("8,192", "424–443", "0.90", "7.3"),)


def test_what_no_table_knows_is_shown_field_by_field():
    rows = [{"op": "new", "shape": "a", "ours_us": 1234.5, "count": 3}, {"op": "new", "shape": "b"}]
    (table,) = report.tables(document(*rows))["new"]
    assert table.columns == ("shape", "ours_us", "count")
    assert table.rows == (("a", "1,234", "3"), ("b", "–", "–"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": None}, "device is no str: None"),
        ({"rows": {}}, "rows is no list of objects"),
        ({"rows": [ROW, ROW | {"op": 3}]}, "rows[1]: op is no text: 3"),
        ({"rows": [ROW | {"ratio": 0.81}]}, "rows[0]: ratio is 0.81, expected peer_us / ours_us"),
        ({"rows": [ROW | {"ours_us": 0}]}, "rows[0]: ours_us is no time: 0"),
        ({"rows": [ROW | {"times_floor": math.inf}]}, "rows[0]: times_floor is inf"),
    ],
)
def test_a_file_that_is_not_one(tmp_path, change, words):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document(ROW)))
    assert report.read(path)["rows"] == [ROW]
    path.write_text(json.dumps(document(ROW) | change))
    with pytest.raises(ValueError, match=f"^{re.escape('x.json: ' + words)}$"):
        report.read(path)


def test_command(tmp_path, capsys):
    assert main(["bench", "report"]) == 0
    out, _ = capsys.readouterr()
    assert all(f"## {name}" in out for name in report.names())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document(ROW) | {"partial": True}))
    assert main(["bench", "report", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("## mine\n\nInterrupted: not all shapes were measured. `x` on one a GPU;")
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text().replace("| 2.30 |", "| 1.30 |"))
    assert main(["bench", "report", "--update", str(copy)]) == 0
    assert copy.read_text() == README.read_text()
    path.write_text("{")
    assert main(["bench", "report", str(path)]) == 2
    assert "mla-jax: mine.json: not JSON" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def control_c():
    """As in a terminal: what a shell starts in the background ignores this signal."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupted_rows() -> Iterator[dict[str, Any]]:
    yield ROW
    signal.raise_signal(signal.SIGINT)
    yield ROW | {"shape": "never"}


def test_control_c_leaves_a_valid_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(schedules, "run", interrupted_rows)
    path = tmp_path / "rows.json"
    assert main(["bench", "schedule", "--json", str(path)]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("paged_decode B2-h16-s4096")
    assert err == "mla-jax: interrupted\n"
    kept = report.read(path)
    assert kept["rows"] == [ROW]
    assert kept["partial"] is True
    assert list(tmp_path.iterdir()) == [path]

    monkeypatch.setattr(schedules, "run", lambda: iter([ROW, ROW]))
    assert main(["bench", "schedule", "--json", str(path)]) == 0
    whole = report.read(path)
    assert len(whole["rows"]) == 2
    assert "partial" not in whole


def test_decode_step_writes_as_it_goes(monkeypatch, tmp_path, capsys):
    """An interruption in the whole model leaves the kernels' rows; a bar shows on a terminal."""
    ceilings = {"bandwidth_gb_s": 7.0}
    monkeypatch.setattr(timing, "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr("rich.console.Console", functools.partial(Console, force_terminal=True))

    def kernel(batch: int, heads: int, length: int, bandwidth: float) -> dict[str, Any]:
        return {"op": "paged_decode", "shape": f"B{batch} h{heads} s{length}", "at": bandwidth}

    def experts(config: object, batch: int, bandwidth: float) -> dict[str, Any]:
        return {"op": "expert_ffn", "shape": f"B{batch}", "at": bandwidth}

    monkeypatch.setattr(decode_step, "bench_attention", kernel)
    monkeypatch.setattr(decode_step, "bench_experts", experts)
    monkeypatch.setattr(decode_step, "bench_step", lambda *args: signal.raise_signal(signal.SIGINT))
    path = tmp_path / "step.json"
    argv = ["--preset", "tiny", "--batch", "1,3", "--length", "9", "--json", str(path)]
    assert main(["bench", "decode-step", *argv]) == 130
    kept = report.read(path)
    assert (kept["preset"], kept["partial"], kept["ceilings"]) == ("tiny", True, ceilings)
    assert [row["shape"] for row in kept["rows"]] == [
        *("B128 h16 s4096", "B1 h8 s9", "B1", "B3 h8 s9", "B3"),
    ]
    assert {row["at"] for row in kept["rows"]} == {7.0}
    out, _ = capsys.readouterr()
    assert "measuring" in out
    assert "/4" in out
