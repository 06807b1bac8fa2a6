"""Tuning: tables that merge and are read, candidates that fail, what is timed, the command line."""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mla_jax.bench import results, tune
from mla_jax.cli import tune as tune_cli
from mla_jax.cli.main import main
from pallas_kernels import causal_prefill, tuning
from pallas_kernels.causal_prefill import tiles as causal_tiles
from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_attention import PagedProblem, PagedTiles, choose_tiles
from pallas_kernels.paged_attention.tiles import default_tiles

DEVICE = Device(platform="gpu", kind="Some GPU 9", num_cores=4)
KEY = {"op": "paged_decode", "heads": 16, "rows": 32, "page_size": 64, "dtype": "bfloat16"}
TILES = PagedTiles(rows=64, keys=16, num_warps=2, num_stages=5, blocks_per_core=3)
PROBLEM = PagedProblem(
    op="paged_decode",
    batch=3,
    tokens=2,
    heads=16,
    latent=512,
    rope=64,
    page_size=64,
    dtype="bfloat16",
    num_ids=12,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are read from, instead of the package's; what was read is forgotten after."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    tuning._table.cache_clear()
    yield tmp_path / "tuned"
    tuning._table.cache_clear()


def entry(tiles=TILES, **key):
    return {**KEY, **key, "tiles": dataclasses.asdict(tiles), "us": 1.5, "default_us": 2.0}


def test_a_recorded_entry_is_the_next_choice(folder):
    """Also where this process has already looked: nothing, then an entry, then a better one."""
    path = folder / "some_gpu_9.json"
    assert tuning.table_name("Some GPU 9") == path.name
    assert choose_tiles(PROBLEM, DEVICE) == default_tiles(32, "bfloat16")
    tuning.record(path, entry(), {"device": "Some GPU 9"})
    assert choose_tiles(PROBLEM, DEVICE) == TILES
    tuning.record(path, entry(dataclasses.replace(TILES, rows=16)), {"device": "Some GPU 9"})
    assert choose_tiles(PROBLEM, DEVICE).rows == 16
    assert len(tuning.read_table(path)) == 1


@pytest.mark.parametrize(
    "other",
    [{"heads": 8}, {"tokens": 1}, {"page_size": 16}, {"dtype": "float16"}, {"op": "paged_prefill"}],
)
def test_an_entry_holds_for_its_key_alone(folder, other):
    tuning.record(folder / "some_gpu_9.json", entry(), {})
    problem = dataclasses.replace(PROBLEM, **other)
    assert choose_tiles(problem, DEVICE) == default_tiles(problem.rows, problem.dtype)
    alike = dataclasses.replace(PROBLEM, batch=77, num_ids=5000)
    assert choose_tiles(alike, DEVICE) == TILES


def test_records_merge_under_the_last_header(folder):
    path = folder / "x.json"
    tuning.record(path, entry(), {"commit": "a"})
    tuning.record(path, entry(heads=8), {"commit": "b"})
    tuning.record(path, entry() | {"us": 1.0}, {"commit": "c"})
    document = json.loads(path.read_text())
    assert document == {"commit": "c", "entries": [entry(heads=8), entry() | {"us": 1.0}]}
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries"'])
def test_a_file_that_is_no_table(folder, text):
    folder.mkdir()
    path = folder / "some_gpu_9.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some_gpu_9.json: got a file that holds no table"):
        tuning.record(path, entry(), {})
    assert path.read_text() == text


def test_causal_tiles_follow_the_table_for_long_requests(folder):
    problem = causal_prefill.CausalProblem(
        batch=1,
        tokens=1 << 14,
        keys=1 << 14,
        heads=16,
        width=192,
        value_width=128,
        dtype="bfloat16",
        causal=True,
    )
    assert causal_tiles.choose_tiles(problem, DEVICE) == causal_tiles.CausalTiles(
        rows=128, keys=64, num_warps=8, num_stages=3
    )
    found = causal_tiles.CausalTiles(rows=64, keys=32, num_warps=4, num_stages=2)
    key = {"op": "causal_prefill", "width": 192, "value_width": 128, "dtype": "bfloat16"}
    made = {**key, "tiles": dataclasses.asdict(found), "us": 1.0, "default_us": 1.0}
    tuning.record(folder / "some_gpu_9.json", made, {})
    assert causal_tiles.choose_tiles(problem, DEVICE) == found
    narrow = dataclasses.replace(problem, width=128)
    assert causal_tiles.choose_tiles(narrow, DEVICE).rows == 128
    short = dataclasses.replace(problem, batch=1 << 10)
    assert causal_tiles.choose_tiles(short, DEVICE).rows == 64


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 32, 33, 1024])
def test_candidates(rows):
    """A handful, all different, the default of 16-bit types among them, no half empty block."""
    candidates = tune.paged_candidates(rows)
    assert 5 <= len(candidates) == len(set(candidates)) <= 7
    assert default_tiles(rows, "bfloat16") in candidates
    if rows:
        assert all(tiles.rows == 16 or tiles.rows < 2 * rows for tiles in candidates)


def tiles_of(rows: int) -> PagedTiles:
    return dataclasses.replace(TILES, rows=rows)


def target_of(call: Callable, candidates: list[int], workloads: int = 2) -> tune.Target:
    """`call(rows)` is the function under test; tiles differ in their rows, the default has 1."""
    work = tune.Workload(call=lambda tiles: call(tiles.rows), args=(jnp.ones(3),), calls=2)
    return tune.Target(
        key=KEY,
        default=tiles_of(1),
        candidates=[tiles_of(rows) for rows in candidates],
        workloads=lambda: [work] * workloads,
    )


@pytest.fixture
def made_up_times(monkeypatch):
    """Sets the seconds that the programs of each workload take, in order of the candidates."""

    def set_times(*columns: list[float]) -> None:
        left = list(columns)

        def seconds(bursts):
            column = left.pop(0)
            assert len(bursts) == len(column)
            for burst in bursts:
                burst(1)
            return column

        monkeypatch.setattr(tune, "alternating_seconds", seconds)

    return set_times


def test_the_smallest_geometric_mean_wins(made_up_times):
    # 2 calls a chain. Sums would prefer the default, whose product is the largest but one.
    made_up_times([2e-6, 40e-6, 8e-6], [90e-6, 1.6e-6, 72e-6])
    found, skipped = tune.measure(target_of(lambda rows: lambda x: x, [2, 3, 1]))
    assert skipped == {}
    assert found["us"] == pytest.approx((20 * 0.8) ** 0.5)
    assert found["default_us"] == pytest.approx((1 * 45) ** 0.5)
    assert found["tiles"] == dataclasses.asdict(tiles_of(2))
    assert {name: found[name] for name in KEY} == KEY


def test_tiles_that_fail_are_skipped(made_up_times):
    """Whether tracing fails or the result is another one, or none."""

    def call(rows: int) -> Callable:
        def run(x):
            if rows == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory\nand more")
            return x * {3: 1.02, 4: jnp.nan}.get(rows, 1.0)

        return run

    made_up_times([2e-6, 1e-6])
    found, skipped = tune.measure(target_of(call, [2, 3, 4, 5], workloads=1))
    assert found["tiles"]["rows"] == 5
    assert skipped[tiles_of(2)] == "RESOURCE_EXHAUSTED: shared memory"
    assert "away from the default tiles'" in skipped[tiles_of(3)]
    assert "nan away" in skipped[tiles_of(4)]
    assert len(skipped) == 3


def test_default_tiles_that_fail_are_an_error():
    def call(rows: int) -> Callable:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        tune.measure(target_of(call, [2]))


@pytest.mark.parametrize(
    ("make", "key", "calls"),
    [
        (
            lambda: tune.decode_target(
                heads=3, tokens=2, page_size=16, dtype="float32", batch=2, length=9, interpret=True
            ),
            {"op": "paged_decode", "heads": 3, "rows": 6, "page_size": 16, "dtype": "float32"},
            [4, 20],
        ),
        (
            lambda: tune.prefill_target(
                heads=3, page_size=16, dtype="float32", length=20, interpret=True
            ),
            {"op": "paged_prefill", "heads": 3, "rows": 0, "page_size": 16, "dtype": "float32"},
            [4],
        ),
        (
            lambda: tune.causal_target(
                dtype="float32", length=20, device=DEVICE, heads=2, interpret=True
            ),
            {"op": "causal_prefill", "width": 192, "value_width": 128, "dtype": "float32"},
            [4],
        ),
    ],
)
def test_what_is_timed_are_the_kernels(make, key, calls):
    """Interpreted once, with the default tiles and another candidate: finite and alike."""
    target = make()
    assert target.key == key
    workloads = target.workloads()
    assert [work.calls for work in workloads] == calls
    work = workloads[-1]
    outputs = [jax.jit(work.call(t))(*work.args) for t in (target.default, target.candidates[0])]
    assert outputs[0].shape == work.args[0].shape
    assert jnp.isfinite(outputs[0]).all()
    assert jnp.abs(outputs[0] - outputs[1]).max() < 1e-4


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        status = main(["tune", *argv])
    except SystemExit as exit_:  # argparse's own refusals
        status = int(exit_.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "tune: needs a GPU, this is a cpu"),
        (["--ops", "paged_decode,route"], "ops: got 'route', expected some of paged_decode"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--tokens", "1,9"], "tokens: got 9, expected at most 8"),
        (["--batch", "0"], "batch: got 0, expected at least 1"),
        (["--length", "3"], "length: got 3, expected at least the query tokens"),
        (["--out", "/no/such/folder/x.json"], "out: /no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, folder, argv, words):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("argv", [["--heads", "0"], ["--page-sizes", "a"]])
def test_numbers_are_positive_integers(capsys, argv):
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert "Traceback" not in err


GPU = AbstractMesh((), (), abstract_device=AbstractDevice("Some GPU 9", 4, "gpu"))


@pytest.mark.parametrize("named", [True, False])
def test_command_writes_a_table_that_is_used(capsys, folder, tmp_path, monkeypatch, named):
    """On a GPU by name only: measuring is made up, one of the candidates did not run."""

    def measure(target):
        assert len(target.candidates) > 4
        found = {"tiles": dataclasses.asdict(TILES), "us": 1.5, "default_us": 2.0}
        return {**target.key, **found}, {target.candidates[-1]: "too much [shared] memory"}

    monkeypatch.setattr(tune, "measure", measure)
    path = tmp_path / "table.json" if named else folder / "some_gpu_9.json"
    argv = ["--heads", "8,16", "--tokens", "2", "--page-sizes", "64,1"]
    with jax.sharding.use_abstract_mesh(GPU):
        status, out, err = run(capsys, *argv, *(["--out", str(path)] if named else []))
        assert (status, err) == (0, "")
        assert (choose_tiles(PROBLEM, current_device()) == TILES) is not named
    assert out.count("too much [shared] memory") == len(tuning.read_table(path)) == 9
    assert "heads 16 rows 32 page_size 64 dtype bfloat16: 1.5 us, default 2 us" in out
    document = json.loads(path.read_text())
    assert set(document) == {*results.header(), "entries"}
    ops = [made["op"] for made in document["entries"]]
    assert set(ops) == set(tune_cli.OPS)
