"""The paged benchmark: what it counts, its naive peer, its rows, its errors and its picture."""

import dataclasses
import importlib.util
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from benched import assert_refused

from mla_jax.bench import paged, peers, plot, report, results, timing
from mla_jax.paged import DEFAULT_SM_SCALE

CEILINGS = {"bandwidth_gb_s": 100.0, "matmul_tflop_s": 0.5}
TINY = paged.PagedShape(name="tiny", lengths=(70, 3), heads=2, tokens=2)
FIELDS = [
    "op",
    "shape",
    "dtype",
    "page_size",
    "backend",
    "deterministic",
    "ours_us",
    "peer",
    "peer_us",
    "ratio",
    "gb_s",
    "tflop_s",
    "of_bandwidth",
    "of_matmul",
    "times_floor",
]


def test_counts_by_hand():
    shape = paged.SHAPES["B128-h128-s4096-q2"]
    assert shape.moved == 128 * 4096 * 1152 + 128 * 2 * 128 * 1088 * 2
    assert shape.flops == 2 * 2 * 128 * 128 * 4096 * 1088
    assert TINY.moved == 73 * 1152 + 2 * 2 * 2 * 1088 * 2
    assert TINY.flops == 2 * 2 * 2 * 73 * 1088
    assert TINY.pages == [2, 1]
    # 101,504 bytes at 100 GB/s, 635,392 operations at 0.5 TFLOP/s.
    assert TINY.floor(CEILINGS) == pytest.approx(635_392 / 0.5e6)
    assert TINY.floor({**CEILINGS, "matmul_tflop_s": 1e3}) == pytest.approx(101_504 / 100e3)


def test_named_shapes():
    ragged = paged.SHAPES["ragged64-h16-q4"].lengths
    assert (ragged[0], ragged[-1], len(ragged)) == (256, 1012, 64)
    normal = paged.SHAPES["normal128-h16"].lengths
    drawn = np.random.default_rng(0).normal(4096, 2048, 128)
    inside = (drawn > 2) & (drawn < 8191)
    assert inside.sum() > 100
    assert np.abs(np.array(normal) - drawn)[inside].max() <= 0.5
    assert (min(normal), max(normal)) == (1, 8192)
    assert paged.SHAPES["B128-h16-s4096-p1"].page_size == 1
    assert all(name == shape.name for name, shape in paged.SHAPES.items())
    assert not any("," in name for name in paged.SHAPES)
    assert paged.find_shapes(None) == list(paged.SHAPES.values())


def test_inputs_fill_exact_pools_in_any_order(seed):
    inputs = paged.make_inputs(TINY, seed)
    assert inputs.ckv.shape == (3, 64, 512)
    assert inputs.kpe.shape == (3, 64, 64)
    table = np.asarray(inputs.table)
    assert sorted([*table[0], table[1, 0]]) == [0, 1, 2]
    assert table.shape == (2, 2)


def test_page_size_leaves_the_tokens(seed):
    """Request by request, the same values whatever the page that holds them."""

    def tokens(page_size: int) -> np.ndarray:
        shape = paged.PagedShape(name="x", lengths=(128, 64), heads=1, page_size=page_size)
        inputs = paged.make_inputs(shape, seed)
        both = np.concatenate([oracles.float64(inputs.ckv), oracles.float64(inputs.kpe)], -1)
        rows = zip(np.asarray(inputs.table), shape.pages, strict=True)
        return np.concatenate([both[row[:count]].reshape(-1, 576) for row, count in rows])

    np.testing.assert_array_equal(tokens(16), tokens(64))
    np.testing.assert_array_equal(tokens(1), tokens(64))


def case_of(inputs: peers.PagedInputs) -> oracles.PagedCase:
    batch, max_pages = inputs.table.shape
    return oracles.PagedCase(
        q_nope=inputs.q_nope,
        q_pe=inputs.q_pe,
        ckv_cache=inputs.ckv,
        kpe_cache=inputs.kpe,
        page_ids=inputs.table.reshape(-1),
        start=jnp.arange(batch, dtype=jnp.int32) * max_pages,
        length=inputs.length,
    )


def test_naive_attention_against_the_oracle(rng):
    """In float32, lengths that end inside pages, several query tokens, ids shared and padded."""

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    inputs = peers.PagedInputs(
        q_nope=normal(4, 3, 2, 32),
        q_pe=normal(4, 3, 2, 16),
        ckv=normal(5, 8, 32),
        kpe=normal(5, 8, 16),
        table=jnp.asarray(rng.integers(0, 5, (4, 3)), jnp.int32),
        length=jnp.asarray([3, 24, 8, rng.integers(3, 25)], jnp.int32),
    )
    want, _ = oracles.paged_attention(case_of(inputs), DEFAULT_SM_SCALE)
    oracles.assert_within(peers.naive_attention(*inputs.args), want, {1.0: 1e-5})


def test_contenders_against_the_oracle(seed):
    inputs = paged.make_inputs(TINY, seed)
    want, _ = oracles.paged_attention(case_of(inputs), DEFAULT_SM_SCALE)
    for contender in (peers.xla(inputs), paged.ours(inputs, None)):
        assert contender.calls == 20
        paged.check_agreement("tiny", "the oracle", contender.output(), want)
    with pytest.raises(RuntimeError, match=r"tiny: our output is .* away from xla's"):
        paged.check_agreement("tiny", "xla", want * 1.02, want)
    with pytest.raises(RuntimeError, match="nan away"):
        paged.check_agreement("tiny", "xla", want * np.nan, want)


def test_every_naive_call_gathers(seed):
    """XLA would do a chain's equal gathers once: a chain of n must hold n times one call's."""

    def gathers(calls: int) -> int:
        inputs = paged.make_inputs(TINY, seed)
        program = timing.chained(peers._naive_call, calls)
        return program.lower(*inputs.args).compile().as_text().count(" gather(")

    assert gathers(1) > 0
    assert gathers(4) == 4 * gathers(1)


@pytest.mark.parametrize("page_size", [64, 16])
def test_rows(seed, page_size):
    shape = dataclasses.replace(TINY, lengths=(128, 64), page_size=page_size)
    against = peers.find_peers(["xla"])
    (row,) = paged.bench_shape(shape, against, CEILINGS, backend="reference", seed=seed)
    alike = page_size == 64
    assert list(row) == [*FIELDS, "xla_calls"] if alike else FIELDS
    assert row["peer"] == ("xla" if alike else "page 64")
    assert row["page_size"] == page_size
    assert (row["shape"], row["backend"]) == ("tiny", "reference")
    assert row["deterministic"] is False
    assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
    assert row["gb_s"] == pytest.approx(shape.moved / row["ours_us"] / 1e3)
    assert row["of_bandwidth"] == pytest.approx(row["gb_s"] / 100)
    assert row["tflop_s"] == pytest.approx(shape.flops / row["ours_us"] / 1e6)
    assert row["of_matmul"] == pytest.approx(row["tflop_s"] / 0.5)
    assert row["times_floor"] == pytest.approx(1 / max(row["of_bandwidth"], row["of_matmul"]))


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_reaches_the_call_and_the_row(seed, monkeypatch, deterministic):
    """Ours and, of another page size, ours at the peers'; with a plan, its time is in the row."""
    asked = []
    call = paged.paged_decode

    def paged_decode(*args, **options):
        asked.append(options["deterministic"])
        return call(*args, **options)

    monkeypatch.setattr(paged, "paged_decode", paged_decode)
    monkeypatch.setattr(paged, "backend_for", lambda shape, backend: "triton")
    shape = dataclasses.replace(TINY, lengths=(128, 64), page_size=16)
    rows = paged.bench_shape(shape, {}, CEILINGS, deterministic=deterministic, seed=seed)
    (row,) = rows
    assert row["deterministic"] is deterministic
    assert set(asked) == {deterministic}
    assert row["plan_us"] > 0
    assert set(row) == {*FIELDS, "plan_us"}


def test_bursts_take_turns():
    """After warming up, every program's burst once a round, in order, and always as many runs."""
    calls: list[tuple[str, int]] = []
    clock = {"a": 0.004, "b": 0.0}

    def burst(name: str):
        def run(runs: int) -> None:
            time.sleep(clock[name] * runs)
            calls.append((name, runs))

        return run

    seconds = timing.alternating_seconds([burst("a"), burst("b")])
    measured = calls[-2 * timing.ROUNDS :]
    assert [name for name, _ in measured] == ["a", "b"] * timing.ROUNDS
    assert len(set(measured)) == 2
    assert seconds[0] >= 0.004 > seconds[1]


@pytest.fixture
def tiny_run(bench_command):
    """`mla-jax bench paged` over the tiny shape, with made-up ceilings: (status, out, err)."""
    return bench_command(paged, {"tiny": TINY}, CEILINGS)


def test_command_writes_its_rows(tiny_run, tmp_path):
    path = tmp_path / "paged.json"
    status, out, _ = tiny_run(
        *("--against", "xla", "--shapes", "tiny", "--deterministic", "--json", str(path))
    )
    assert status == 0
    assert out.startswith("paged_decode tiny")
    document = json.loads(path.read_text())
    assert [(row["peer"], row["deterministic"]) for row in document["rows"]] == [("xla", True)]
    assert document["ceilings"] == CEILINGS
    assert document["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "tiny,huge"], "shapes: got 'huge', expected all or some of tiny"),
        (["--against", "xla,vllm"], "against: got 'vllm', expected some of flash-mla, xla"),
        (["--backend", "cuda"], "backend: got 'cuda'"),
        (["--json", "/no/such/folder/x.json"], "json: /no/such/folder is not a folder"),
        (["--plot", "/no/such/folder/x.svg"], "plot: /no/such/folder is not a folder"),
        (["--plot", "x.pdf"], "plot: got x.pdf, expected a name that ends in .svg or .png"),
    ],
)
def test_a_mistake_is_one_line_before_measuring(tiny_run, argv, words):
    assert_refused(tiny_run, argv, words)


def test_a_missing_peer_is_one_line(tiny_run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flash_mla" else found(name)
    )
    assert list(peers.find_peers(None)) == ["xla"]
    status, out, err = tiny_run("--against", "flash-mla")
    assert (status, out) == (2, "")
    assert "against: flash-mla needs" in err
    assert "sgl-flash-mla" in err
    assert err.count("\n") == 1


def test_a_missing_matplotlib_names_the_extra(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = tiny_run("--plot", "x.svg")
    assert (status, out) == (2, "")
    assert "plot: needs matplotlib: pip install 'mla-jax[notebooks]'" in err


def test_plot_shows_every_shape_and_contender(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = [
        {
            "op": "paged_decode",
            "shape": shape,
            "peer": peer,
            "ours_us": 10.0,
            "peer_us": micros,
            "times_floor": 2.0,
        }
        for shape, peer, micros in (
            ("B1-h2-s3", "flash-mla", 12.5),
            ("B1-h2-s3", "xla", 4321.5),
            ("B4-h5-s6-p1", "page 64", 7.25),
        )
    ]
    path = tmp_path / "paged.svg"
    plot.draw(results.document(rows), path)
    text = path.read_text()
    assert text.startswith("<?xml")
    for words in ("B1-h2-s3", "B4-h5-s6-p1", "ours", "flash-mla", "xla", "page 64"):
        assert f">{words}<" in text
    for micros in ("10 µs", "12.5 µs", "4,322 µs", "7.25 µs"):
        assert micros in text

    plot.draw(results.document(rows), path.with_suffix(".png"))
    picture = plt.imread(path.with_suffix(".png"))
    colours = {tuple(colour) for colour in (picture[..., :3] * 255).round().reshape(-1, 3)}
    bars = [plot.COLOURS[name] for name in ("ours", "flash-mla", "xla", "page 64")]
    assert {tuple(bytes.fromhex(bar[1:])) for bar in bars} <= colours


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prefill_h200", ("h16-t8192", "cudnn", "xla", "reference", "810 µs")),
        ("megakernel_h200", ("four-s45118-n4-h16, triton", "paged_decode (mosaic_gpu)")),
        ("decode_step_h200", ("B1 s1024, decode_step", "2,300 µs")),
    ],
)
def test_plot_of_other_benchmarks(tmp_path, name, words):
    """Peers of any name, rows without one, and steps in milliseconds."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "other.svg"
    plot.draw(report.read(name), path)
    text = path.read_text()
    for word in words:
        assert word in text
