"""The benchmark of decode over fp8 caches: what it counts, its rows and its command."""

import json

import numpy as np
import pytest
from oracles import float64, softmax_sum

from mla_jax.bench import fp8, paged, timing
from mla_jax.cli.main import main
from mla_jax.paged import DEFAULT_SM_SCALE

CEILINGS = {"bandwidth_gb_s": 100.0, "matmul_tflop_s": 0.5}
TINY = paged.PagedShape(name="tiny", lengths=(5, 70), heads=2)


def test_counts_by_hand():
    shape = fp8.SHAPES["B128-h16-s8192"]
    rest = 128 * 16 * 1088 * 2
    assert fp8.moved(shape, "slot") == 128 * 8192 * 656 + rest
    assert fp8.moved(shape, "tensor") == 128 * 8192 * 576 + rest


@pytest.mark.parametrize("layout", list(fp8.BYTES))
def test_what_is_timed_is_right(seed, layout):
    inputs = paged.make_inputs(TINY, seed)
    got = fp8.ours(inputs, layout, "reference").output()
    ckv, kpe = float64(inputs.ckv), float64(inputs.kpe)
    for b, h in np.ndindex(2, 2):
        pages = np.asarray(inputs.table)[b]
        keys, turned = (
            pool[pages].reshape(-1, pool.shape[-1])[: TINY.lengths[b]] for pool in (ckv, kpe)
        )
        scores = keys @ float64(inputs.q_nope)[b, 0, h] + turned @ float64(inputs.q_pe)[b, 0, h]
        want, _ = softmax_sum(scores * DEFAULT_SM_SCALE, keys)
        error = np.linalg.norm(got[b, 0, h] - want) / np.linalg.norm(want)
        assert 1e-3 < error < 1e-1  # rounded, and not by more than e4m3's


def test_command_writes_its_rows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fp8, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(timing, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(timing, "BURST_SECONDS", 1e-3)
    path = tmp_path / "fp8.json"
    assert main(["bench", "fp8", "--json", str(path)]) == 0
    assert capsys.readouterr().out.startswith("paged_decode tiny")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["layout"], row["peer"]) for row in rows] == [
        ("slot", "bfloat16"),
        ("tensor", "bfloat16"),
    ]
    for row in rows:
        assert row["backend"] == "reference"
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
        seconds = fp8.moved(TINY, row["layout"]) / 100e9, TINY.flops / 0.5e12
        assert row["times_floor"] == pytest.approx(row["ours_us"] / max(seconds) / 1e6)
    assert main(["bench", "fp8", "--shapes", "B1"]) == 2
    assert "shapes: got 'B1', expected all or some of tiny" in capsys.readouterr().err
