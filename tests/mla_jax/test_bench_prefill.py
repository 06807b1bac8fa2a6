"""The prefill benchmark: what it counts, its peers against oracles, its rows and its errors."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benched import assert_refused

from mla_jax.bench import prefill

CEILINGS = {"bandwidth_gb_s": 100.0, "matmul_tflop_s": 0.5}
TINY = {
    shape.name: shape
    for shape in (
        dataclasses.replace(prefill.SHAPES["h16-t8192"], heads=2, tokens=40, length=40),
        dataclasses.replace(prefill.SHAPES["h16-t8192-backward"], heads=2, tokens=40, length=40),
        dataclasses.replace(prefill.SHAPES["B1-h16-t128-s8192"], heads=2, tokens=7, length=70),
    )
}
FIELDS = [
    "op",
    "shape",
    "dtype",
    "backend",
    "ours_us",
    "peer",
    "peer_us",
    "ratio",
    "tflop_s",
    "of_matmul",
]


def test_counts_by_hand():
    assert prefill.SHAPES["h16-t32768"].flops == 32768**2 * 16 * 320
    assert prefill.SHAPES["h16-t8192-backward"].flops == 8192**2 * 16 * (3 * 192 + 2 * 128)
    # Twice the keys that the new tokens see, less a token's half key each: 64 to 70 of them.
    pairs = sum(range(64, 71)) - 7 / 2
    assert TINY["B1-h16-t128-s8192"].flops == 2 * pairs * 2 * (576 + 512)
    assert all(name == shape.name for name, shape in prefill.SHAPES.items())
    assert prefill.find_shapes(None) == list(prefill.SHAPES.values())


def naive(q, k, v):
    """In float64, position by position."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty(v.shape)
    for t in range(len(q)):
        scores = np.einsum("hd,khd->hk", q[t], k[: t + 1]) * 192**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[t] = np.einsum("hk,khv->hv", weights / weights.sum(axis=1, keepdims=True), v[: t + 1])
    return out


def test_both_sides_against_float64(seed):
    q, k, v, dout, ranges = prefill.causal_inputs(tokens=33, heads=2, dtype="float32", seed=seed)
    want = naive(q, k, v)
    attends = [prefill.naive_attention, prefill.ours_causal(ranges, None)]
    for attend in attends:
        np.testing.assert_allclose(attend(q, k, v), want, atol=1e-5)
    first, second = (
        prefill._backward(attend, q, k, v, dout, calls=1).output() for attend in attends
    )
    _, pull = jax.vjp(functools.partial(prefill.naive_attention, q, k), v)
    (dv,) = pull(dout)
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert np.abs(first - np.asarray(dv)).max() > 1e-2  # dq and dk are part of it


@pytest.mark.parametrize("name", list(TINY))
def test_rows(seed, name):
    shape = TINY[name]
    rows = list(prefill.bench_shape(shape, CEILINGS, backend="reference", seed=seed))
    paged = shape.op == "paged_prefill"
    assert [row["peer"] for row in rows] == (["reference"] if paged else ["xla", "reference"])
    for row in rows:
        assert list(row) == FIELDS
        assert (row["op"], row["shape"], row["backend"]) == (shape.op, name, "reference")
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["ours_us"])
        assert row["tflop_s"] == pytest.approx(shape.flops / row["ours_us"] / 1e6)
        assert row["of_matmul"] == pytest.approx(row["tflop_s"] / 0.5)


def test_peers_run_where_they_can(seed, monkeypatch):
    shape = TINY["h16-t8192"]
    assert prefill.cudnn_lacks()  # no GPU here
    _, peers = prefill._causal_contenders(shape, None, seed)
    assert list(peers) == ["xla", "reference"]
    monkeypatch.setattr(prefill, "MOST_SCORES", 4 * 2 * 40 * 40 - 1)
    monkeypatch.setattr(prefill, "cudnn_lacks", lambda: None)
    _, peers = prefill._causal_contenders(shape, None, seed)
    assert list(peers) == ["cudnn", "reference"]


@pytest.mark.parametrize("name", ["h16-t8192", "h16-t8192-backward"])
def test_padded_values_change_nothing(seed, monkeypatch, name):
    """What cuDNN's interface asks for, here of the naive attention."""
    shape = TINY[name]
    monkeypatch.setattr(prefill, "cudnn_lacks", lambda: None)
    monkeypatch.setattr(prefill, "cudnn_attention", prefill.naive_attention)
    own, peers = prefill._causal_contenders(shape, None, seed)
    padded, plain = peers["cudnn"]().output(), peers["xla"]().output()
    assert padded.shape == plain.shape == own.output().shape == (40, 2, 128)
    np.testing.assert_allclose(padded, plain, rtol=2e-2, atol=2e-2)


@pytest.fixture
def tiny_run(bench_command):
    """`mla-jax bench prefill` over tiny shapes, with made-up ceilings: (status, out, err)."""
    return bench_command(prefill, TINY, CEILINGS)


def test_command_writes_its_rows(tiny_run, tmp_path):
    path = tmp_path / "prefill.json"
    status, out, _ = tiny_run("--shapes", "h16-t8192", "--json", str(path))
    assert status == 0
    assert out.startswith("causal_prefill h16-t8192")
    document = json.loads(path.read_text())
    assert [row["peer"] for row in document["rows"]] == ["xla", "reference"]
    assert document["ceilings"] == CEILINGS
    assert document["command"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "h16-t8192,huge"], "shapes: got 'huge', expected all or some of h16-t8192"),
        (["--backend", "cuda"], "backend: got 'cuda'"),
        (["--json", "/no/such/folder/x.json"], "json: /no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line_before_measuring(tiny_run, argv, words):
    assert_refused(tiny_run, argv, words)


def test_another_output_is_an_error(seed, monkeypatch):
    monkeypatch.setattr(prefill, "naive_attention", lambda q, k, v: v * jnp.asarray(0.5, v.dtype))
    with pytest.raises(RuntimeError, match=r"h16-t8192: our output is .* away from xla's"):
        next(prefill.bench_shape(TINY["h16-t8192"], CEILINGS, seed=seed))
