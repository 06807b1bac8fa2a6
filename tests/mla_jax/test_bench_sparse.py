"""The benchmark of token-sparse decode: what it counts, its inputs, its rows and its command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from benched import assert_refused
from oracles import float64, softmax_sum

from mla_jax.bench import peers, sparse
from mla_jax.paged import DEFAULT_SM_SCALE

CEILINGS = {"bandwidth_gb_s": 100.0, "matmul_tflop_s": 0.5}
TINY = sparse.SparseShape(name="tiny", batch=2, heads=2, topk=64, tokens=2, cached=130)


def test_counts_by_hand():
    shape = sparse.SHAPES["B128-h128-k2048-q2"]
    assert shape.flops == 2 * 256 * 128 * 2048 * 1088
    assert shape.moved("bfloat16") == 256 * (2048 * 1152 + 128 * 1088 * 2)
    assert shape.moved("float8_e4m3fn") == 256 * (2048 * 656 + 128 * 1088 * 2)


def test_inputs(seed):
    """Each query token lists tokens of its own request, none twice; requests share no page."""
    inputs = sparse.make_inputs(TINY, seed)
    indices = np.asarray(inputs.indices)
    assert indices.shape == (2, 2, 64)
    assert inputs.ckv.shape == (6, 64, 512)
    assert inputs.fp8.packed().shape == (6, 64, 656)
    pages = [set((indices[b] // 64).ravel().tolist()) for b in range(2)]
    assert not pages[0] & pages[1]
    assert all(len(set(row.tolist())) == 64 for row in indices.reshape(-1, 64))
    assert indices.min() >= 0
    assert indices.max() < 6 * 64
    assert (indices[0, 0] != indices[0, 1]).any()


@pytest.mark.parametrize("dtype", list(sparse.BYTES))
def test_what_is_timed_is_right(seed, dtype):
    inputs = sparse.make_inputs(TINY, seed)
    got = sparse.ours(inputs, dtype, "reference").output()
    ckv, kpe = (float64(x).reshape(-1, x.shape[-1]) for x in (inputs.ckv, inputs.kpe))
    for b, s, h in np.ndindex(2, 2, 2):
        at = np.asarray(inputs.indices)[b, s]
        scores = ckv[at] @ float64(inputs.q_nope)[b, s, h] + kpe[at] @ float64(inputs.q_pe)[b, s, h]
        want, _ = softmax_sum(scores * DEFAULT_SM_SCALE, ckv[at])
        error = np.linalg.norm(got[b, s, h] - want) / np.linalg.norm(want)
        assert error < (1e-2 if dtype == "bfloat16" else 1e-1)


@pytest.fixture
def tiny_run(bench_command):
    """`mla-jax bench sparse` over a tiny shape, with made-up ceilings: (status, out, err)."""
    return bench_command(sparse, {"tiny": TINY}, CEILINGS)


def test_command_writes_its_rows(tiny_run, tmp_path):
    path = tmp_path / "sparse.json"
    status, out, _ = tiny_run("--json", str(path))
    assert status == 0
    assert out.startswith("token_sparse tiny")
    rows = json.loads(path.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float8_e4m3fn"]
    for row in rows:
        assert (row["peer"], row["backend"]) == ("reference", "reference")
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
        assert row["tflop_s"] == pytest.approx(TINY.flops / row["ours_us"] / 1e6)
        seconds = TINY.moved(row["dtype"]) / 100e9, TINY.flops / 0.5e12
        assert row["times_floor"] == pytest.approx(row["ours_us"] / max(seconds) / 1e6)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "tiny,huge"], "shapes: got 'huge', expected all or some of tiny"),
        (["--backend", "megakernel"], "backend 'megakernel' has no token_sparse"),
        (["--json", "/no/such/folder/x.json"], "json: /no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line_before_measuring(tiny_run, argv, words):
    assert_refused(tiny_run, argv, words)


def test_flash_mla_where_it_can_run(seed, monkeypatch):
    """It gets the rows of 656 bytes, and another output is an error."""
    inputs = sparse.make_inputs(TINY, seed)
    monkeypatch.setattr(peers, "flash_mla_lacks", lambda: None)
    given = []

    def stand_in(q_nope, q_pe, rows, indices):
        given.append(rows.shape)
        assert rows.dtype == jnp.uint8
        wrong = sparse.ours(inputs, "bfloat16", "reference")
        return peers.Contender(
            burst=wrong.burst, output=lambda: 0.5 * wrong.output(), calls=wrong.calls
        )

    monkeypatch.setattr(peers, "flash_mla_sparse", stand_in)
    with pytest.raises(RuntimeError, match=r"tiny: our output is .* away from flash-mla's"):
        next(sparse.bench_shape(TINY, CEILINGS, seed=seed))
    assert given == [(6, 64, 656)]
