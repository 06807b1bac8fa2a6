"""The grouped-query benchmark: what it counts, its contenders against oracles, its rows, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benched import assert_refused
from oracles import float64, softmax_sum

from mla_jax.bench import grouped, grouped_programs, report, timing

CEILINGS = {"bandwidth_gb_s": 100.0, "matmul_tflop_s": 0.5, "copy_gb_s": 80.0}
DECODE = grouped_programs.DecodeShape(
    name="B2-h4-kv2-d16-s192",
    batch=2,
    heads=4,
    kv_heads=2,
    width=16,
    length=192,
    bars={"xla": 1.0},
    bar_of_copy=0.85,
)
PREFILL = [
    grouped_programs.PrefillShape(
        name=f"h2-d16-t512-{pattern}",
        heads=2,
        width=16,
        tokens=512,
        pattern=pattern,
        bars={"dense": 1.7},
    )
    for pattern in ("dense", "causal", "blocks25")
]
TINY = {shape.name: shape for shape in (DECODE, *PREFILL)}


def test_counts_by_hand():
    decode = grouped.SHAPES["B64-h32-kv8-d128-s4096"]
    assert decode.flops == 64 * 32 * 4096 * 2 * (128 + 128)
    assert decode.moved == 64 * 4096 * 8 * (128 + 128) * 2 + 64 * 32 * (128 + 128) * 2
    flops = [grouped.SHAPES[f"h16-d128-t16384-{shape.pattern}"].flops for shape in PREFILL]
    assert flops[0] == 16384**2 * 16 * 2 * (128 + 128)
    assert flops[1] == sum(range(1, 16385)) * 16 * 2 * (128 + 128)
    assert flops[2] == flops[0] / 4
    assert grouped.SHAPES["h16-d128-t16384-causal"].moved == 4 * 16384 * 16 * 128 * 2
    assert all(name == shape.name for name, shape in grouped.SHAPES.items())
    assert grouped.find_shapes(None) == list(grouped.SHAPES.values())


def test_decode_inputs(seed):
    """Blocks in any order; the contiguous keys are the same tokens."""
    inputs = DECODE.draw(jax.random.key(seed))
    table = np.asarray(inputs["table"])
    np.testing.assert_array_equal(np.sort(table, axis=1), [[0, 1, 2]] * 2)
    for name in "kv":
        cache, tokens = float64(inputs[f"{name}_cache"]), float64(inputs[name])
        assert tokens.shape == (2, 192, 2, 16)
        for b, h, t in ((0, 0, 0), (0, 1, 70), (1, 0, 191)):
            want = cache[b, h, table[b, t // 64], t % 64]
            np.testing.assert_array_equal(tokens[b, t, h], want)


def test_prefill_inputs(seed):
    """A quarter of the blocks, the diagonal's among them; as many in each row, in any columns."""
    shape = grouped.SHAPES["h16-d128-t16384-blocks25"]
    inputs = dataclasses.replace(shape, heads=1, width=1).draw(jax.random.key(seed))
    layout = np.asarray(inputs["layout"])
    assert layout.shape == (256, 256)
    assert layout.diagonal().all()
    assert (layout.sum(axis=1) == 64).all()
    columns = layout.sum(axis=0)
    assert 30 < columns.min() < columns.max() < 100
    np.testing.assert_array_equal(inputs["k"][0, 0], inputs["k_by_token"][0, :, 0])


def outputs(shape, inputs):
    """Of each contender, cuDNN's in XLA's place: what is compared, and what it should be."""
    for name, program in shape.programs("reference").items():
        out = jax.jit(program.call)(*program.arguments(inputs))
        assert out.shape == inputs[program.needs[0]].shape
        yield name, float64(program.seen(out)), float64(program.expected(inputs))


@pytest.fixture
def no_cudnn(monkeypatch):
    """JAX's attention without its names of implementations, which are kept."""
    asked, attention = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        asked.append(implementation)
        return attention(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return asked


def assert_near(got: np.ndarray, want: np.ndarray, at_most: float) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < at_most


def test_decode_against_float64(seed, no_cudnn):
    """Lengths are values: one here ends inside a block."""
    inputs = DECODE.draw(jax.random.key(seed))
    inputs["length"] = inputs["length"].at[0].set(100)
    want = np.empty((2, 4, 16))
    for b, h in np.ndindex(2, 4):
        own = slice(None, (100, 192)[b])
        k, v = (float64(inputs[name])[b, own, h // 2] for name in "kv")
        scores = k @ float64(inputs["q"])[b, h, 0] / 4
        want[b, h], _ = softmax_sum(scores, v)
    want = want.reshape(4, 2, 16)  # a request's two key heads, and the two heads of each
    found = set()
    for name, got, expected in outputs(DECODE, inputs):
        found.add(name)
        assert_near(expected, want, 1e-3)
        assert_near(got, want, 1e-2 if name == "ours" else 5e-2)
    assert found == {"ours", "cudnn", "cudnn contiguous", "xla", "xla contiguous"}
    assert no_cudnn == ["cudnn"] * 2 + ["xla"] * 2


@pytest.mark.parametrize("shape", PREFILL, ids=lambda shape: shape.pattern)
def test_prefill_against_float64(seed, no_cudnn, shape):
    inputs = shape.draw(jax.random.key(seed))
    q, k, v = (float64(inputs[name])[0] for name in "qkv")
    place = np.arange(512)
    blocks = np.asarray(inputs["layout"]).repeat(64, axis=0).repeat(64, axis=1)
    visible = {
        "dense": np.ones((512, 512), bool),
        "causal": place <= place[:, None],
        "blocks25": blocks,
    }
    scores = q @ k.swapaxes(1, 2) / 4
    for name, got, expected in outputs(shape, inputs):
        knows = name == "ours" or (name != "dense" and shape.pattern == "causal")
        seen = visible[shape.pattern if knows else "dense"]
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        want = weights / weights.sum(axis=-1, keepdims=True) @ v
        want = want[:, ::2]  # of 512 queries, about 250
        assert_near(expected, want, 1e-3)
        assert_near(got, want, 1e-2 if name in ("ours", "dense") else 5e-2)
    assert set(no_cudnn) == {"cudnn", "xla"}


def test_every_call_gathers_for_itself(seed):
    """XLA would do a chain's equal gathers once: a chain of n must hold n times one call's."""
    inputs = DECODE.draw(jax.random.key(seed))
    program = DECODE.programs("reference")["xla"]

    def gathers(calls: int) -> int:
        chain = timing.chained(program.call, calls).lower(*program.arguments(inputs))
        return chain.compile().as_text().count(" gather(")

    assert gathers(1) > 0
    assert gathers(3) == 3 * gathers(1)


@pytest.fixture
def tiny_run(bench_command):
    """`mla-jax bench grouped` over tiny shapes, with made-up ceilings: (status, out, err)."""
    return bench_command(grouped, TINY, CEILINGS)


def test_command_writes_its_rows(tiny_run, tmp_path):
    path, picture = tmp_path / "grouped.json", tmp_path / "grouped.svg"
    status, out, _ = tiny_run("--json", str(path), "--plot", str(picture))
    assert status == 0
    assert out.startswith(f"grouped_decode {DECODE.name}")
    document = report.read(path)
    rows = document["rows"]
    assert [(row["shape"].split("-")[-1], row["peer"], row.get("bar")) for row in rows] == [
        *(("s192", "xla", 1.0), ("s192", "xla contiguous", None)),
        ("dense", "xla", None),
        *(("causal", "dense", 1.7), ("causal", "xla", None)),
        *(("blocks25", "dense", 1.7), ("blocks25", "xla", None)),
    ]
    for row in rows:
        shape = TINY[row["shape"]]
        assert (row["op"], row["backend"]) == (shape.op, "reference")
        assert row["tflop_s"] == pytest.approx(shape.flops / row["ours_us"] / 1e6)
        seconds = shape.moved / 100e9, shape.flops / 0.5e12
        assert row["times_floor"] == pytest.approx(row["ours_us"] / max(seconds) / 1e6)
        assert row["alone_us"] > 0
        assert row["lacks"]["cudnn"]  # no GPU here
    assert rows[0]["of_copy"] == pytest.approx(DECODE.moved / rows[0]["ours_us"] / 80e3)
    assert rows[0]["bar_of_copy"] == 0.85
    assert "of_copy" not in rows[2]
    text = report.markdown("grouped", document)
    assert f"| 2 × 4:2 × 16, 192 | `reference` | {rows[0]['ours_us']:,.1f} |" in text
    assert f"| {rows[4]['ratio']:.2f} | {rows[3]['ratio']:.2f} (at least 1.7) |" in text
    assert "contiguous" in picture.read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "huge"], f"shapes: got 'huge', expected all or some of {DECODE.name}"),
        (["--backend", "mosaic_gpu"], "backend 'mosaic_gpu' has no grouped_decode"),
        (["--shapes", PREFILL[0].name, "--backend", "cuda"], "backend: got 'cuda'"),
        (["--json", "/no/such/folder/x.json"], "json: /no/such/folder is not a folder"),
    ],
)
def test_a_mistake_is_one_line_before_measuring(tiny_run, argv, words):
    assert_refused(tiny_run, argv, words)


def prepared(ours: float, peers: float) -> dict[str, grouped.Prepared]:
    """Programs of the dense prefill whose outputs are multiplied by these factors."""
    shape = PREFILL[0]
    programs = shape.programs("reference")

    def compiled(program, factor: float) -> grouped.Compiled:
        def check(inputs):
            out = program.seen(program.call(*program.arguments(inputs)))
            return jnp.asarray(factor, out.dtype) * out, program.expected(inputs)

        return grouped.Compiled(chain=jax.jit(program.call), check=check)

    ready = grouped.Prepared(
        draw=shape.draw,
        alone=jax.jit(programs["ours"].call),
        programs={
            "ours": compiled(programs["ours"], ours),
            "xla": compiled(programs["xla"], peers),
        },
        lacks={"cudnn": "no GPU"},
    )
    return {shape.name: ready}


def test_wrong_outputs(monkeypatch, seed):
    """Ours is an error, a peer's is left out; what is left is a row of our own."""
    monkeypatch.setattr(timing, "BURST_SECONDS", 1e-3)
    shape, options = PREFILL[0], {"backend": "reference", "seed": seed}
    with pytest.raises(RuntimeError, match=r"dense: the output of ours is .* away from plain"):
        next(grouped.bench_shape(shape, CEILINGS, prepared=prepared(1.02, 1), **options))
    (row,) = grouped.bench_shape(shape, CEILINGS, prepared=prepared(1, 0.5), **options)
    assert "peer" not in row
    assert row["lacks"]["cudnn"] == "no GPU"
    assert "away from plain attention" in row["lacks"]["xla"]
    document = {"rows": [row]}
    (table,) = report.tables(document)["sparse_prefill"]
    assert table.columns[-1] == "TFLOP/s"
    assert table.rows[0][0] == "2 × 16, 512, all keys"
