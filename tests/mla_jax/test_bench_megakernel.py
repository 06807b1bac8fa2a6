"""The benchmark of decoding by a schedule, and the cost model that is fitted to measured times."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from oracles import float64
from scheduled import SCALE, ScheduledCase, dense

from mla_jax.bench import costs, megakernel, timing, tune
from mla_jax.bench.megakernel import decode_chain
from mla_jax.bench.paged import make_inputs
from mla_jax.cli.main import main
from mla_jax.megakernel import CostModel, schedule
from pallas_kernels import tuning
from pallas_kernels.device import Device, current_device
from pallas_kernels.megakernel.persistent import choose_tiles
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_attention.tiles import default_tiles
from pallas_kernels.schedule.instructions.costs import device_costs

SMALL = {"small": ([300, 40], 2)}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(megakernel, "SHAPES", SMALL)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "BURST_SECONDS", 1e-6)
    ceilings = {"bandwidth_gb_s": 1000.0, "matmul_tflop_s": 100.0}
    monkeypatch.setattr(timing, "measure_ceilings", lambda: ceilings)
    monkeypatch.setattr(megakernel.by_schedule, "__kwdefaults__", {"calls": 2})


def test_rows(small, monkeypatch, tmp_path):
    monkeypatch.setattr(megakernel, "HEADS", (8,))
    path = tmp_path / "rows.json"
    command = ["bench", "megakernel", "--shapes", "small", "--against", "xla", "--json", str(path)]
    assert main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["shape"] for row in rows] == ["small-h8"] * 2
    assert [row["peer"] for row in rows] == ["paged_decode (reference)", "xla"]
    for row in rows:
        assert row["backend"] == "reference"  # where there is no GPU
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
        assert row["makespan_us"] == schedule(*SMALL["small"], num_heads=8).makespan
        assert row["over_makespan"] == pytest.approx(row["ours_us"] / row["makespan_us"])
        assert row["costs"] == "default"


def test_pages_of_peers_hold_the_same_tokens(small):
    shape, other = megakernel.find_shapes(["small"])
    assert (shape.heads, other.heads) == (16, 8)
    inputs = make_inputs(shape)
    cut = megakernel.in_pages_of_peers(inputs)
    assert cut.ckv.shape[1:] == (64, 512)
    assert cut.kpe.shape[1:] == (64, 64)
    for b, length in enumerate(shape.lengths):
        for pool, parts in ((inputs.ckv, cut.ckv), (inputs.kpe, cut.kpe)):
            whole = float64(pool)[np.asarray(inputs.table[b])].reshape(-1, pool.shape[-1])
            again = float64(parts)[np.asarray(cut.table[b])].reshape(-1, pool.shape[-1])
            np.testing.assert_array_equal(again[:length], whole[:length])


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [("shapes", "none", "shapes: got 'none'"), ("backend", "cuda", "backend: got 'cuda'")],
)
def test_wrong_names(capsys, option, value, text):
    assert main(["bench", "megakernel", f"--{option}", value]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (4, 8)])
def test_fit_finds_the_model_that_made_the_times(rng, tokens, heads):
    """From times of its own timelines, with a little noise, and not from the fit's equations."""
    true = CostModel(
        **{
            field.name: field.default * rng.uniform(0.7, 1.5)
            for field in dataclasses.fields(CostModel)
        }
    )

    def time(plans, *_):
        promised = [dataclasses.replace(plan, cost_model=true).makespan for plan in plans]
        return [micros * rng.uniform(1 - 1e-4, 1 + 1e-4) for micros in promised]

    entry, times = costs.measure_costs(tokens, heads, 132, time=time)
    found = CostModel(**entry["costs"])
    assert entry["rows"] == tokens * heads
    for _, measured, promised in times:
        assert promised == pytest.approx(measured, rel=1e-3)
    # The sums that times can tell; input times are small beside the rest.
    for name in ("partial_overhead", "partial_step", "reduction_tail"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02)
    assert found.reduction_input == pytest.approx(true.reduction_input, rel=0.05)
    lengths = rng.integers(200, 20_000, 4).tolist()
    plan = schedule(lengths, tokens, cost_model=found)
    other = dataclasses.replace(plan, cost_model=true)
    assert plan.makespan == pytest.approx(other.makespan, rel=0.05)


@pytest.mark.parametrize("experiment", costs.EXPERIMENTS, ids=str)
def test_hand_made_schedules_fill_the_device(experiment):
    """Sound, as every Schedule is, and equal work on 132 processors, or nearly so many."""
    plan = costs.hand_made(experiment, 4, 16, 132)
    processors, _ = plan.instructions.shape[:2]
    assert 132 - experiment.inputs - 4 < processors <= 132
    words = plan.instructions[plan.instructions[..., 0] == 1]
    assert set((words[:, 7] - words[:, 6]).tolist()) == {experiment.steps * 32}
    reductions = set(map(len, plan.dependencies.values()))
    assert reductions == (set() if experiment.kind == "whole" else {experiment.inputs})


def test_schedules_go_by_measured_costs(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    device = Device(platform="gpu", kind="NVIDIA Test", num_cores=132)
    path = tmp_path / tuning.table_name(device.kind)
    slow = CostModel(partial_step=3.0)
    entry = {"op": "megakernel_costs", "rows": 64, "costs": dataclasses.asdict(slow)}
    tuning.record(path, entry, {})
    tuning.record(path, entry | {"rows": 16}, {})
    tuning.record(path, entry, {})  # in place of the first
    assert len(tuning.read_table(path)) == 2
    assert device_costs(device, 64) == slow
    assert device_costs(device, 32) == CostModel()
    module = "pallas_kernels.schedule.instructions.backward.current_device"
    monkeypatch.setattr(module, lambda: device)
    assert schedule([4096], 4).cost_model == slow
    assert schedule([4096], 2).cost_model == CostModel()
    assert schedule([4096], 4, cost_model=CostModel()).cost_model == CostModel()


def test_tuning_ends_in_schedules_that_go_by_it(monkeypatch, capsys, tmp_path):
    """The command on a GPU by name only: times are those of a model, which the table then holds."""
    true = CostModel(partial_step=0.5, partial_start=1.0, partial_writeout=1.5)
    asked = []

    def measure(target):
        tiles = dataclasses.asdict(target.candidates[-1])
        return {**target.key, "tiles": tiles, "us": 1.0, "default_us": 2.0}, {}

    def measured(plans, tokens, heads, tiles):
        asked.append((tokens, heads, tiles))
        return [dataclasses.replace(plan, cost_model=true).makespan for plan in plans]

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(costs, "measured", measured)
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA Test", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(gpu):
        assert main(["tune", "megakernel"]) == 0
        for tokens, heads in itertools.product((1, 2, 4), (16, 8)):
            plan = schedule([9000, 300], tokens, num_heads=heads)
            assert plan.cost_model.partial_step == pytest.approx(true.partial_step, rel=1e-3)
            assert plan.cost_model.partial_overhead == pytest.approx(2.5, rel=1e-3)
            tiles = choose_tiles(tokens, heads, "bfloat16", current_device())
            assert (tokens, heads, tiles) in asked or (tokens * heads // 16, 16, tiles) in asked
    assert [(tokens, heads) for tokens, heads, _ in asked] == [(1, 8), (1, 16), (2, 16), (4, 16)]
    out = capsys.readouterr().out
    assert "kind whole steps 64 inputs 1: 34.5 us, the model says 34.5" in out
    assert out.count("megakernel_costs rows") == 4


def test_tune_needs_a_gpu(capsys):
    assert main(["tune", "megakernel"]) == 2
    assert "tune: needs a GPU" in capsys.readouterr().err


def test_measured_runs_what_it_is_given(small, monkeypatch):
    """Every plan by one program, in the interpreter: its own launches over its own keys."""
    plans = [
        costs.hand_made(experiment, 2, 8, 6)
        for experiment in (
            costs.Experiment("whole", 9),
            costs.Experiment("delivered", 1, 4),
            costs.Experiment("held", 3, 3),
        )
    ]
    tiles = default_tiles(16, "bfloat16")
    programs, ran = [], []

    def chain(*args):
        programs.append(decode_chain(*args))
        return lambda *args: ran.append((args, programs[-1](*args))) or ran[-1][1]

    monkeypatch.setattr(costs, "decode_chain", chain)
    monkeypatch.setattr(costs, "DEFAULT_SM_SCALE", SCALE)
    monkeypatch.setattr(costs, "FIRST_REDUCTION", 16)  # less scratch for the interpreter to copy
    micros = costs.measured(plans, 2, 8, tiles, calls=1, interpret=True)
    assert len(micros) == 3
    assert min(micros) > 0
    assert [timing.compilations(program) for program in programs] == [1]
    for plan, ((_, q_v, q_rot, v, k_rot, table), (out, _, _)) in zip(plans, ran, strict=False):
        case = ScheduledCase(**{"q_rot": q_rot, "q_v": q_v, "k_rot": k_rot, "v": v, "table": table})
        lengths = plan.lengths.tolist()
        want = dense(case, lengths)
        np.testing.assert_allclose(float64(out)[: plan.batch], want[: plan.batch], atol=3e-2)


def test_tiles_that_agree_get_an_entry(small):
    target = costs.tiles_target(tokens=1, heads=16, lengths=[260, 40], calls=1, interpret=True)
    target = dataclasses.replace(target, candidates=target.candidates[:2])
    entry, skipped = tune.measure(target)
    assert not skipped
    assert {name: entry[name] for name in target.key} == target.key
    assert PagedTiles(**entry["tiles"]) in target.candidates


@pytest.mark.parametrize("rows", [8, 16, 32, 48, 64])
def test_candidates_hold_all_rows(rows):
    heads = 8 if rows == 8 else 16
    target = costs.tiles_target(tokens=rows // heads, heads=heads)
    assert len(target.candidates) >= 4
    assert target.default in target.candidates or rows == 32  # which masks in one loop
    assert all(tiles.rows >= rows for tiles in target.candidates)
