"""What the benchmark counts and writes; the numbers themselves are the device's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from drawn import drawn
from flax import nnx

from mla_jax import Decoder, presets
from mla_jax.bench import decode_step, results, timing

CONFIG = dataclasses.replace(presets["tiny"], n_layers=2)


def test_a_chain_makes_its_calls():
    assert timing.chained(lambda x, y: x + y, 7)(jnp.float32(1), jnp.float32(2)) == 15


def test_bytes_count_touched_experts_only():
    """Against a sum by hand over the tiny model's shapes, in float32."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    moe, mla = CONFIG.moe, CONFIG.mla
    assert moe is not None
    dim, heads = mla.dim, mla.n_heads
    attention = (
        mla.q_lora_rank * (dim + 1 + heads * mla.qk_head_dim)
        + (mla.kv_lora_rank + mla.qk_rope_head_dim) * dim
        + mla.kv_lora_rank * (1 + heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        + dim * heads * mla.v_head_dim
    )
    dense = 3 * dim * CONFIG.inter_dim
    experts = (2 + moe.n_shared) * 3 * dim * moe.inter_dim + moe.n_routed * (dim + 1)
    norms = 2 * CONFIG.n_layers * dim + dim
    head = CONFIG.vocab * dim
    cache = 3 * 100 * (mla.kv_lora_rank + mla.qk_rope_head_dim) * CONFIG.n_layers
    by_hand = 4 * (2 * attention + dense + experts + norms + head + cache)
    assert decode_step.bytes_a_step(model, [2], batch=3, length=100) == by_hand


def test_bytes_count_what_an_indexer_reads():
    """Of 100 tokens each every key of 32 bytes with its scale, and 64 latents."""
    mla = dataclasses.replace(CONFIG.mla, index_n_heads=2, index_head_dim=32, index_topk=64)
    plain, indexed = (
        drawn(lambda of=of: Decoder(of, rngs=nnx.Rngs(0)), 0)
        for of in (dataclasses.replace(CONFIG, n_layers=1, mla=of) for of in (CONFIG.mla, mla))
    )
    weights = 2 * 32 * mla.q_lora_rank + 32 * mla.dim + 2 * 32 + 2 * mla.dim
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    more = 4 * weights + 3 * 100 * (32 + 4) - 4 * 3 * (100 - 64) * latent
    counted = (decode_step.bytes_a_step(of, [], batch=3, length=100) for of in (indexed, plain))
    assert next(counted) - next(counted) == more
    assert decode_step.bench_step(indexed, 2, 70, ceiling=10.0)["compilations"] == 1


def test_a_step_is_measured_without_compiling_again():
    row = decode_step.bench_step(Decoder(CONFIG, rngs=nnx.Rngs(0)), 2, 40, ceiling=10.0)
    assert row["compilations"] == 1
    assert row["tokens_s"] == pytest.approx(2 / row["ms_a_step"] * 1e3)
    assert row["times_floor"] == pytest.approx(row["ms_a_step"] / row["floor_ms"])
    assert 2 <= row["experts_a_layer"] <= 4


@pytest.mark.parametrize("batch", [1, 3])
def test_kernel_rows(batch):
    row = decode_step.bench_attention(batch, 2, 64, ceiling=10.0)
    assert row["gb_s"] == pytest.approx(
        (batch * 64 * 1152 + batch * 2 * 2176) / row["ours_us"] / 1e3
    )
    row = decode_step.bench_experts(CONFIG, batch, ceiling=10.0)
    assert 2 <= row["experts_read"] <= 4


def test_results_are_whole_files_without_folders(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["x", "bench", "decode-step", "--json", str(path)])
    monkeypatch.setenv("MLA_JAX_COMMIT", "abc")
    results.write(path, [{"op": "x", "ours_us": 1.0}], ceilings={"copy_gb_s": 2.0})
    document = json.loads(path.read_text())
    assert document["command"] == "mla-jax bench decode-step --json result.json"
    assert document["commit"] == "abc"
    assert document["versions"]["jax"] == jax.__version__
    assert document["rows"] == [{"op": "x", "ours_us": 1.0}]
    assert list(tmp_path.iterdir()) == [path]
