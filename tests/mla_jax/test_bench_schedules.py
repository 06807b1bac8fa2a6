"""The benchmark of schedules: its rows, and the picture of a timeline."""

import json

import pytest

from mla_jax.bench import schedules
from mla_jax.cli.main import main
from mla_jax.megakernel import schedule


def test_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(schedules, "SHAPES", {"small": ([300, 4096], 2), "one": ([40], 1)})
    path = tmp_path / "rows.json"
    assert main(["bench", "schedule", "--json", str(path)]) == 0
    small, one = json.loads(path.read_text())["rows"]
    plan = schedule([300, 4096], 2)
    assert small["shape"] == "small"
    assert small["makespan_us"] == plan.makespan
    assert small["partials"] + small["reductions"] == len(plan.uids)
    assert small["reductions"] == len(plan.dependencies) > 0
    assert (one["partials"], one["reductions"]) == (1, 0)
    assert min(one["first_ms"], one["again_ms"]) > 0


def test_picture_shows_every_event():
    plan = schedule([9000, 300], 2, num_processors=30)
    *lines, legend = schedules.picture(plan, columns=1000).plain.split("\n")
    assert len(lines) == 30
    assert legend == f"0 to {plan.makespan:.1f} µs; # partial, = reduction"
    for processor, line in enumerate(lines):
        assert line[:4] == f"{processor:3} "
        for op, mark in (("partial", "#"), ("reduction", "=")):
            events = [e for e in plan.timeline() if (e.processor, e.op) == (processor, op)]
            length = sum(event.end - event.start for event in events) * 1000 / plan.makespan
            assert line.count(mark) == pytest.approx(length, abs=1 + len(events))


def test_picture_of_a_shape(capsys):
    assert main(["bench", "schedule", "--picture", "B1-s65536-n1"]) == 0
    assert capsys.readouterr().out.count("#") > 132


def test_no_such_shape(capsys):
    assert main(["bench", "schedule", "--picture", "nothing"]) == 2
    assert "picture: got 'nothing', expected one of four-s45118-n4" in capsys.readouterr().err
