"""The time of a decode step on paper, against counts by hand, draws, and what was measured."""

import dataclasses
import itertools

import numpy as np
import pytest

from mla_jax import presets
from mla_jax.bench import report
from mla_jax.sharding.estimate import Machine, estimate_step, experts_hit, rank_meshes
from mla_jax.sharding.plan import Link

V3, LITE = presets["deepseek-v3"], presets["deepseek-v2-lite"]
FAST, SLOW = Link(gb_per_s=400, latency_us=9), Link(gb_per_s=50, latency_us=30)
H200 = Machine(memory_gb=141, bandwidth_gb_s=4000, tflop_s=700, link=FAST, network=SLOW)


def test_deepseek_v3_by_hand():
    """Two groups of 64 rows over 8 devices each, in bfloat16."""
    dim, heads, layers, dense, item = 7168, 128, 61, 3, 2
    step = estimate_step(V3, H200, batch=128, tokens=4096, data=2, model=8)
    shared = dim * (1536 + 576) + 1536 + 512 + 2 * dim
    split = heads * (192 * 1536 + 256 * 512 + 128 * dim) // 8
    always = layers * (shared + split) + dense * 3 * 18432 * dim // 8
    always += (layers - dense) * (3 * 2048 * dim // 8 + 256 * dim) + 129280 * dim // 8 + dim
    expert = 3 * 2048 * dim
    chosen = 1 - (248 / 256) ** 64
    read = item * (always + (layers - dense) * 32 * chosen * expert)
    read += 4 * 256 * (layers - dense)  # float32 biases
    assert step.weight_seconds == pytest.approx(read / 4e12, rel=1e-12)
    # A token's eight experts, one on each device in the mean.
    products = 2 * 64 * (always + (layers - dense) * (expert + 256))
    assert step.product_seconds == pytest.approx(products / 7e14, rel=1e-12)
    cached = 64 * 4096 * layers
    assert step.cache_seconds == pytest.approx(cached * 576 * item / 4e12, rel=1e-12)
    assert step.attention_seconds == pytest.approx(cached * 16 * 2 * 1088 / 7e14, rel=1e-12)
    sent = 2 * 7 / 8 * 64 * dim * item
    assert step.message_seconds == pytest.approx(2 * layers * (9e-6 + sent / 400e9), rel=1e-12)
    assert step.seconds == pytest.approx(
        step.weight_seconds + step.cache_seconds + step.message_seconds
    )
    assert step.tokens_per_s == pytest.approx(128 / step.seconds)
    assert step.bound == "weights"


def test_experts_hit_is_what_draws_hit(rng):
    for rows in (1, 5, 40):
        distinct = [
            len({int(e) for _ in range(rows) for e in rng.permutation(64)[:6]}) for _ in range(900)
        ]
        # Five standard errors of the mean, and a little for none at all.
        error = 5 * np.std(distinct) / 900**0.5 + 1e-9
        assert abs(experts_hit(LITE, rows) * 64 - np.mean(distinct)) < error


def test_what_a_step_reads_is_what_the_benchmark_counts():
    """The benchmark counts the experts that its routers chose, and the keys half-way in a block."""
    measured = report.read("decode_step_h200")
    bandwidth = measured["ceilings"]["bandwidth_gb_s"]
    machine = dataclasses.replace(H200, bandwidth_gb_s=bandwidth)
    rows = [row for row in measured["rows"] if row["op"] == "decode_step"]
    assert len(rows) >= 3
    for row in rows:
        batch, length = (int(part[1:]) for part in row["shape"].split())
        step = estimate_step(LITE, machine, batch=batch, tokens=length + 16)
        read = (step.weight_seconds + step.cache_seconds) * bandwidth
        experts = (row["experts_a_layer"] / 64 - experts_hit(LITE, batch)) * 64
        counted = row["gigabytes_a_step"] - 26 * experts * 3 * 2048 * 1408 * 2 / 1e9
        assert read == pytest.approx(counted, rel=1e-3)


def test_fp8_halves_the_matrices():
    sizes = {"batch": 64, "tokens": 4096, "model": 8}
    plain, fp8 = (estimate_step(V3, H200, dtype=dtype, **sizes) for dtype in (None, "fp8"))
    kept = 2 * (129280 * 7168 * 9 // 8 + 58 * 256 * 7168)  # embedding, head and routers
    halved = plain.plan.weight_bytes - kept
    expected = kept + halved / 2 * (1 + 4 / 16384)
    assert fp8.plan.weight_bytes == pytest.approx(expected, rel=1e-4)  # but for the norms
    assert not plain.fits
    assert fp8.fits
    assert fp8.parts | {"weights": 0} == plain.parts | {"weights": 0}


@pytest.mark.parametrize(
    ("mesh", "link"),
    [
        ({"model": 8}, FAST),
        ({"model": 16}, SLOW),
        ({"data": 4, "model": 4}, FAST),
        ({"model": 1, "context": 8}, FAST),
        ({"model": 4, "context": 4}, SLOW),  # whose all-reduces stay within a node
    ],
)
def test_a_message_takes_the_link_that_it_needs(mesh, link):
    step = estimate_step(V3, H200, batch=16, tokens=4096, **mesh)
    message = step.plan.messages[-1]
    others = sum(other.seconds(FAST) for other in step.plan.messages[:-1])
    assert step.message_seconds == pytest.approx(others + message.seconds(link))
    alike = dataclasses.replace(H200, network=None)
    one_link = estimate_step(V3, alike, batch=16, tokens=4096, **mesh)
    assert one_link.message_seconds == pytest.approx(step.plan.message_seconds(FAST))


def test_context_devices_share_the_cache():
    """Nine pages over four devices: the fullest reads three."""
    alone, spread = (
        estimate_step(V3, H200, batch=1, tokens=9 * 64, context=context) for context in (1, 4)
    )
    assert spread.cache_seconds == pytest.approx(alone.cache_seconds * 3 / 9)
    assert spread.attention_seconds == pytest.approx(alone.attention_seconds * 3 / 9)
    assert spread.weight_seconds == alone.weight_seconds


def test_ranking_has_every_mesh_once_in_order():
    steps = rank_meshes(V3, H200, devices=16, batch=24, tokens=4096, dtype="fp8")
    meshes = [(step.data, step.context, step.model) for step in steps]
    powers = (1, 2, 4, 8, 16)
    every = [mesh for mesh in itertools.product(powers, repeat=3) if np.prod(mesh) == 16]
    assert sorted(meshes) == [mesh for mesh in every if 24 % mesh[0] == 0]
    assert {step.fits for step in steps} == {True, False}
    keys = [(not step.fits, step.seconds) for step in steps]
    assert keys == sorted(keys)
    for step in steps:
        total = step.plan.weight_bytes + step.plan.cache_bytes + step.plan.logits_bytes
        assert step.fits == (total <= 141e9)
        assert step.parts[step.bound] == max(step.parts.values())


def test_devices_that_the_model_does_not_divide_over():
    """Of 1,000 = 8 x 125 devices `model` can have 8 at most: too few for bfloat16."""
    steps = rank_meshes(V3, H200, devices=1000, batch=1000, tokens=4096)
    assert {step.model for step in steps} == {1, 2, 4, 8}
    assert not any(step.fits for step in steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices: got 0, expected at least 1"),
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"tokens": 0}, "tokens: got 0, expected at least 1"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rank_meshes(V3, H200, **{"devices": 2, "batch": 2, "tokens": 2, **change})
    with pytest.raises(ValueError, match=r"^tflop_s: got 0, expected more than 0$"):
        dataclasses.replace(H200, tflop_s=0)


def test_an_indexer():
    """Of 4,096 tokens every key of 132 bytes is read and scored, and 2,048 latents attended to."""
    config = presets["deepseek-v3.2"]
    steps = rank_meshes(config, H200, devices=16, batch=32, tokens=4096)
    assert {step.context for step in steps} == {1}
    step = estimate_step(config, H200, batch=32, tokens=4096, model=16)
    read = 32 * 61 * (4096 * 132 + 2048 * 576 * 2)
    assert step.cache_seconds == pytest.approx(read / (H200.bandwidth_gb_s * 1e9))
    products = 2 * 32 * 61 * (4096 * 64 * 128 + 2048 * 8 * (576 + 512))
    assert step.attention_seconds == pytest.approx(products / (H200.tflop_s * 1e12))
