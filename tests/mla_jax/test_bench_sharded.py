"""The benchmark of many devices: its programs' results, and what it counts, on fake devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import float64

from mla_jax import MLAConfig, presets
from mla_jax.bench import link, report, sharded, timing
from mla_jax.bench import sharded_programs as programs
from mla_jax.bench.meshed import compile_all, random_arrays, struct
from mla_jax.cli.main import main

LAYER = MLAConfig(dim=32, n_heads=4, q_lora_rank=16)
MODEL = dataclasses.replace(presets["tiny"], n_layers=1, n_dense=0).replace_dtype("bfloat16")
SIZES = sharded.Sizes(
    link=link.LinkSizes(dim=64, decode=(1, 2), large=(16,)),
    layer=LAYER,
    batch=2,
    length=70,
    contexts=(150,),
    model=MODEL,
    step_batches=(2,),
    step_length=70,
)
CEILINGS = {"bandwidth_gb_s": 10.0, "matmul_tflop_s": 0.1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sharded, "SIZES", SIZES)
    monkeypatch.setattr(timing, "CALLS", 2)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "BURST_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "measure_ceilings", lambda: CEILINGS)
    # Of three devices two are used.
    monkeypatch.setattr(jax, "device_count", lambda: 3)


def test_every_part(tmp_path, capsys):
    path, picture = tmp_path / "sharded_x2.json", tmp_path / "sharded.png"
    assert main(["bench", "sharded", "--json", str(path), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = report.read(path)
    assert document["devices"] == 2
    assert document["ceilings"] == CEILINGS
    rows = document["rows"]
    assert [(row["op"].removeprefix("sharded_"), row["shape"]) for row in rows] == [
        *(("all_reduce", f"{count}x64") for count in (1, 2, 16)),
        ("attention", "B2-h4-s70"),
        *[("layer", "B2-h4-s70")] * 2,
        ("context", "B1-h4-s150"),
        *[("step", "B2-s70")] * 2,
    ]
    measured = document["link"]
    assert measured["latency_us"] == min(row["ours_us"] for row in rows[:3])
    assert measured["gb_per_s"] == max(row["gb_s"] for row in rows[:3])
    for row in rows[:3]:
        # Of two devices each sends its half twice.
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ours_us"] / 1e3)
    assert [row.get("bar_us") for row in rows[:3]] == [25, 25, None]
    assert [row.get("bar") for row in rows[3:7]] == [0.9, 0.8, None, 1.4]
    peers = [row["peer"] for row in rows[3:7]]
    two, four = (f"one device, {heads} heads" for heads in (2, 4))
    assert peers == [two, two, four, "one device"]
    for row in rows[3:7]:
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
        assert row["times_floor"] == pytest.approx(row["ours_us"] / row["floor_us"])
    check_floors(rows[3], rows[4], measured)
    alone, both = rows[7:]
    assert (alone["devices"], both["devices"]) == (1, 2)
    assert alone["efficiency"] == alone["speedup"] == 1
    assert both["efficiency"] == pytest.approx(alone["ms_a_step"] / both["ms_a_step"] / 2)
    assert both["tokens_s"] == pytest.approx(2e3 / both["ms_a_step"])

    capsys.readouterr()
    assert main(["bench", "report", str(path)]) == 0
    text, _ = capsys.readouterr()
    assert "on 2 cpu; " in text
    assert f"{measured['latency_us']:,.1f} µs a message" in text
    assert f"| 16 × 64 | 2 | {rows[2]['ours_us']:,.1f} | – |" in text
    assert f"| 2 × 4, 70, model=2, beside {two} | {rows[3]['ours_us']:,.1f} |" in text
    assert f"| 2, model=2 | {both['ms_a_step']:.2f} |" in text


def check_floors(kernel, layer, measured):
    """A kernel's bytes and operations on its share of the heads, the layer's weights, its sum."""
    moved = 2 * (2 * 70 * 576 + 2 * 2 * 1088)
    flops = 2 * 2 * 2 * 70 * 1088
    attention = max(moved / 10e9, flops / 1e11)
    assert kernel["floor_us"] == pytest.approx(attention * 1e6)
    weights = 16 * 32 + 16 + 2 * 192 * 16 + 576 * 32 + 512 + 2 * 256 * 512 + 32 * 2 * 128
    products = max(2 * weights / 10e9, 2 * 2 * weights / 1e11)
    message = measured["latency_us"] * 1e-6 + 2 * 32 * 2 / (measured["gb_per_s"] * 1e9)
    assert layer["floor_us"] == pytest.approx((attention + products + message) * 1e6)


def test_one_part_with_what_it_needs(tmp_path):
    path = tmp_path / "x.json"
    assert main(["bench", "sharded", "--only", "link", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {row["op"] for row in document["rows"]} == {"all_reduce"}
    assert document["link"]["gb_per_s"] > 0


def runs_of(maker, filler, axis, *sizes, length):
    """The result of a program on one device, and of the same on two."""
    meshes = [sharded.first_devices(count, axis) for count in (1, 2)]
    made = [maker(mesh, *sizes, length) for mesh in meshes]
    results = []
    for program, run in zip(made, compile_all(made), strict=True):
        runs = filler(program, run, length)
        runs.burst(2)  # the second run takes the state that the first one left
        results.append((runs, float64(runs.result)))
    return results


def test_heads_over_devices_are_those_of_one():
    for maker, filler, sizes in (
        (programs.attention_by_heads, programs.kernel_runs, (4, 2)),
        (programs.layer_by_heads, programs.layer_runs, (LAYER, 2)),
    ):
        (_, want), (_, got) = runs_of(maker, filler, "model", *sizes, length=70)
        assert np.abs(want).max() > 0.1
        # A partial sum is rounded before it is added, and each of the two layers' results after.
        np.testing.assert_allclose(got, want, rtol=0, atol=2**-7 * np.abs(want).max())


def test_context_is_attention_over_all_keys(monkeypatch):
    """Three pages on two devices, against float64: absorbed queries, scores, values."""
    monkeypatch.setattr(timing, "CALLS", 1)
    results = runs_of(
        programs.attention_by_context, programs.context_runs, "context", LAYER, length=150
    )
    runs = results[0][0]
    weights, q_pe, pools, table, _ = runs.rest
    layer = jax.tree.unflatten(layer_tree(), weights)
    wkv_b = float64(layer.wkv_b.weight[...]).reshape(4, 256, 512)
    places = np.asarray(table)[0]
    ckv, kpe = (float64(pool)[places].reshape(-1, pool.shape[-1])[:150] for pool in pools)
    query = np.einsum("hn,hnc->hc", float64(runs.x)[0, 0], wkv_b[:, :128])
    scores = (query @ ckv.T + float64(q_pe)[0, 0] @ kpe.T) * LAYER.softmax_scale
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    latent = probs / probs.sum(-1, keepdims=True) @ ckv
    want = float64(runs.x)[0, 0] + np.einsum("hc,hvc->hv", latent, wkv_b[:, 128:])
    for _, got in results:
        # Half a unit of numbers below two when the sum is rounded, as much for all before it.
        np.testing.assert_allclose(got[0, 0], want, rtol=0, atol=2**-7)


def layer_tree():
    mesh = sharded.first_devices(1)
    return jax.tree.structure(
        programs.module_structs(lambda: programs.MLA(LAYER, rngs=programs.nnx.Rngs(0)), mesh)
    )


def test_data_are_the_same_on_every_mesh():
    """Uniform numbers of the asked deviation, others for every array."""
    drawn = []
    for count in (1, 8):
        mesh = sharded.first_devices(count)
        pair = [struct(mesh, (64, 16, 32), jnp.float32, "model")] * 2
        drawn.append(random_arrays(pair, 5, lambda shape: shape[-1] ** -0.5))
    (first, second), (again, _) = drawn
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-6)
    assert {part.data.shape for part in again.addressable_shards} == {(8, 16, 32)}
    values, others = np.ravel(first), np.ravel(second)
    # Four standard errors: of the mean, the deviation, and correlations.
    error = 4 / values.size**0.5
    assert abs(values.mean()) < error * 32**-0.5
    assert values.std() == pytest.approx(32**-0.5, rel=error)
    assert np.abs(values).max() <= 3**0.5 * 32**-0.5
    for shifted in (others, *(np.roll(values, by) for by in (1, 32, 512))):
        assert abs(np.corrcoef(values, shifted)[0, 1]) < error


def test_sums_are_sent_and_right():
    mesh = sharded.first_devices(2)
    program = link.sums(mesh, 3, 8)
    x = jnp.arange(48, dtype=jnp.bfloat16).reshape(6, 8)
    share = jnp.asarray([1, 0.5], jnp.bfloat16)
    run = program.compile()
    text = run.as_text()
    assert link.messages_in(text) == 2
    places = [arg.sharding for arg in (program.args[0], program.args[2])]
    result, _ = run(jax.device_put(x, places[0]), (), jax.device_put(share, places[1]))
    first = float64(x[:3]) + float64(x[3:])
    want = first * 1.5  # the second sum, of the first one times 1 and times a half
    np.testing.assert_allclose(
        float64(result), np.concatenate([want, want / 2]), rtol=2**-6, atol=0
    )


def test_sums_that_are_not_sent_are_no_measurement(monkeypatch, capsys):
    monkeypatch.setattr(link, "messages_in", lambda text: 1)
    assert main(["bench", "sharded", "--only", "link"]) == 2
    assert "link: a program of 2 sums sends 1 messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "devices", "message"),
    [
        ((), 1, "devices: got 1, expected at least 2"),
        (("--only", "link,nodes"), 2, "only: got 'nodes', expected some of link, heads, context"),
        (("--plot", "x.pdf"), 2, "plot: got x.pdf, expected a name that ends in .svg or .png"),
        (("--json", "no/where/x.json"), 2, "json: no/where is not a folder"),
    ],
)
def test_refusals(monkeypatch, capsys, arguments, devices, message):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert main(["bench", "sharded", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())
