"""The plan of a mesh, against the memory and the messages of compiled programs."""

import json
import re

import jax
import numpy as np
import pytest
from meshed import BATCH, CONFIG, MAX_PAGES, PAGE, SHAPES, label, mesh_of, model
from oracles import QUICK_COMPILE
from test_cli import run

from mla_jax import PagedLatentCache, decode_step, presets
from mla_jax.sharding import shard_model
from mla_jax.sharding.plan import Link, Message, plan_decode

LINK = ("--link-gb-s", "300", "--link-us", "10")
ITEM = {"f32": 4, "u32": 4, "bf16": 2, "u16": 2}


def message_sizes(program: str | None) -> list[tuple[str, int]]:
    """(kind, bytes that a device receives) of each message of a compiled program."""
    assert program is not None
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather)(?:-start)?\(", program)
    return sorted(
        (kind, ITEM[dtype] * int(np.prod([int(size) for size in shape.split(",")])))
        for dtype, shape, kind in found
    )


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_the_plan_is_the_compiled_program(seed, shape):
    mesh = mesh_of(shape)
    sharded = shard_model(model(seed), mesh)
    # As many pages as eight rows fill.
    cache = PagedLatentCache.create(
        CONFIG,
        num_pages=BATCH * MAX_PAGES,
        page_size=PAGE,
        max_batch=BATCH,
        max_pages=MAX_PAGES,
        mesh=mesh,
    )
    tokens = jax.device_put(np.zeros(BATCH, np.int32), cache.lengths.sharding)
    step = jax.jit(decode_step, donate_argnums=2, compiler_options=QUICK_COMPILE)
    with jax.set_mesh(mesh):
        program = step.lower(sharded, tokens, cache).compile()
    plan = plan_decode(CONFIG, batch=BATCH, tokens=MAX_PAGES * PAGE, page_size=PAGE, **shape)
    assert plan.devices == 8

    memory = program.memory_analysis()
    assert memory is not None
    token_bytes = BATCH // shape["data"] * 4
    assert memory.argument_size_in_bytes == plan.weight_bytes + plan.cache_bytes + token_bytes
    assert memory.alias_size_in_bytes == plan.cache_bytes
    # Beside the two results there is a table of pointers to all of them.
    results = plan.cache_bytes + plan.logits_bytes
    assert 0 <= memory.output_size_in_bytes - results <= 8 * (2 * CONFIG.n_layers + 3)

    expected = []
    for message in plan.messages:
        gathered = message.devices if message.kind == "all-gather" else 1
        expected += [(message.kind, message.bytes * gathered)] * message.count
    assert message_sizes(program.as_text()) == sorted(expected)


def test_deepseek_v3_by_hand():
    """Heads, experts and vocabulary over 16, two groups of 64 rows, one layer's cache 576 wide."""
    plan = plan_decode(presets["deepseek-v3"], batch=128, tokens=4096, data=2, model=16)
    dim, heads, layers, dense = 7168, 128, 61, 3
    attention = dim * (1536 + 576) + (heads * 192 * 1536 + heads * 256 * 512) // 16
    attention += dim * heads * 128 // 16 + 1536 + 512 + 2 * dim
    moe = (256 * 3 * 2048 * dim + 3 * 2048 * dim) // 16 + 256 * dim
    weights = layers * attention + dense * 3 * 18432 * dim // 16 + (layers - dense) * moe
    weights += 129280 * dim + 129280 * dim // 16 + dim
    assert plan.weight_bytes == 2 * weights + (layers - dense) * 256 * 4  # float32 biases
    assert plan.cache_bytes == 64 * 4096 * 576 * 2 * layers + 64 * (64 + 1) * 4
    assert plan.messages == (
        Message(kind="all-reduce", axis="model", devices=16, count=122, bytes=64 * dim * 2),
    )


def test_an_indexers_keys_by_hand():
    """128 numbers of a byte and a scale a token; its weights are whole on every device."""
    plain, plan = (
        plan_decode(presets[f"deepseek-{name}"], batch=128, tokens=4096, data=2, model=16)
        for name in ("v3", "v3.2")
    )
    assert plan.cache_bytes - plain.cache_bytes == 64 * 4096 * (128 + 4) * 61
    indexer = 64 * 128 * 1536 + 128 * 7168 + 64 * 7168
    assert plan.weight_bytes - plain.weight_bytes == 61 * (2 * indexer + 2 * 128 * 4)
    assert plan.messages == plain.messages


def test_deepseek_v3_in_fp8_by_hand():
    """A byte a number of each matrix and a scale for 128 x 128 of them; the rest in bfloat16."""
    plan = plan_decode(presets["deepseek-v3"], batch=1, tokens=64, dtype="fp8")
    dim, heads, layers, dense = 7168, 128, 61, 3
    square = dim * 1536 + heads * 192 * 1536 + heads * 256 * 512 + dim * heads * 128
    square = layers * square + 3 * dense * 18432 * dim + 3 * (layers - dense) * 257 * 2048 * dim
    latent = 576 * dim  # four blocks and a half
    scales = square // 128**2 + layers * 5 * dim // 128
    plain = layers * (1536 + 512 + 2 * dim) + (layers - dense) * 256 * dim + (2 * 129280 + 1) * dim
    biases = (layers - dense) * 256
    assert plan.weight_bytes == square + layers * latent + 4 * scales + 2 * plain + 4 * biases
    assert (
        0.5
        < plan.weight_bytes / plan_decode(presets["deepseek-v3"], batch=1, tokens=64).weight_bytes
        < 0.51
    )
    with pytest.raises(ValueError, match=r"^dtype: got 'int8', expected None or 'fp8'$"):
        plan_decode(presets["tiny"], batch=1, tokens=64, dtype="int8")


def test_the_time_of_messages():
    plan = plan_decode(CONFIG, batch=8, tokens=64, model=2, context=4)
    reduce, gather = plan.messages
    # Of a ring of two each sends its half twice; of four each passes on three parts.
    assert reduce.sent() == reduce.bytes
    assert gather.sent() == 3 * gather.bytes
    expected = sum(m.count * (5e-6 + m.sent() / 50e9) for m in plan.messages)
    assert plan.message_seconds(Link(gb_per_s=50, latency_us=5)) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"^gb_per_s: got 0, expected more than 0$"):
        Link(gb_per_s=0, latency_us=5)
    with pytest.raises(ValueError, match=r"^latency_us: got -1, expected 0 or more$"):
        Link(gb_per_s=1, latency_us=-1)


def test_the_command_line(capsys):
    command = ("doctor", "--plan", "--preset", "deepseek-v3", "--batch", "128")
    mesh = ("--mesh", "data=4,model=16")
    status, out, _ = run(capsys, *command, *mesh)
    assert status == 0
    assert "deepseek-v3 on 64 devices: data=4 model=16" in out
    assert "all-reduce over model: 122 a step, 458.8 kB each" in out
    status, out, _ = run(capsys, *command, *mesh, *LINK, "--json")
    assert status == 0
    report = json.loads(out)
    sent = 2 * 15 / 16 * 32 * 7168 * 2
    assert report["message_us"] == pytest.approx(122 * (10 + sent / 300e3))
    assert report["messages"][0]["devices"] == 16
    assert "step_us" not in report
    rates = ("--bandwidth-gb-s", "4000", "--tflop-s", "700", "--memory-gb", "141")
    status, out, _ = run(capsys, *command, *mesh, *LINK, *rates, "--json")
    assert status == 0
    timed = json.loads(out)
    assert timed["bound"] == "weights"
    assert timed["step_us"] > timed["message_us"] + timed["parts_us"]["weights"]
    status, out, _ = run(capsys, *command, *mesh, *LINK, *rates)
    assert f"at least {timed['step_us']:.1f} us a step" in out
    assert "bound by weights; fits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "model=3"), "mesh: got model=3, expected a divisor of n_heads=16"),
        (("--mesh", "data=2"), "max_batch: got 1, expected a multiple of the mesh's data=2"),
        (
            ("--preset", "deepseek-v3", "--mesh", "model=32", "--dtype", "fp8"),
            "mesh: got model=32, which cuts blocks of FP8 weights (7168, 18432): 18432 is not a "
            "multiple of 32 * 128",
        ),
        (("--batch", "0"), "batch: got 0, expected at least 1"),
        (
            ("--preset", "deepseek-v3.2", "--mesh", "context=2"),
            "mesh: got context=2, expected 1 for a model with an indexer",
        ),
        (
            ("--link-us", "3"),
            "--link-gb-s: got none, expected all of --link-gb-s, --link-us or none",
        ),
        (
            ("--memory-gb", "3"),
            "--bandwidth-gb-s: got none, expected all of --bandwidth-gb-s, --tflop-s, --memory-gb",
        ),
        (
            ("--memory-gb", "3", "--bandwidth-gb-s", "1", "--tflop-s", "1"),
            "--link-gb-s: got none, expected the link's numbers with the device's",
        ),
        (
            (*("--memory-gb", "3", "--bandwidth-gb-s", "0", "--tflop-s", "1"), *LINK),
            "bandwidth_gb_s: got 0.0, expected more than 0",
        ),
    ],
)
def test_refusals(capsys, arguments, message):
    status, out, err = run(capsys, "doctor", "--plan", *arguments)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())
