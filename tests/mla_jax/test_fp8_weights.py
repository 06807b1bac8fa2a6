"""Checkpoints whose FP8 weights stay FP8: numbers against float64 NumPy, memory, files, errors."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fp8_checkpoint import HF, Oracle, Tensors, in_fp8
from fp8_weights import assert_rows_near, quantised
from oracles import QUICK_COMPILE, assert_within, float64
from test_checkpoint import fuse_experts, hf_tensors
from test_cli import run as command

import mla_jax
from mla_jax import Decoder, PagedLatentCache, decode_step, prefill
from mla_jax._safetensors import read_headers
from mla_jax.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mla_jax.nn.linear import Weight
from mla_jax.sharding import make_mesh, shard_model
from pallas_kernels.block_scaled import BlockScaled

WriteCheckpoint = Callable[..., Path]

ONE_LAYER = HF | {"num_hidden_layers": 1, "first_k_dense_replace": 0}


def in_float32(model: Decoder) -> Decoder:
    """The same weights, whatever is not FP8 being float32, so that nothing else rounds much."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and node.dtype == jnp.bfloat16:
            node.set_value(node.get_value().astype(jnp.float32))
    for layer in model.layers:
        layer.attn.config = dataclasses.replace(layer.attn.config, dtype="float32")
    return model


ROWS, SHARE = 8, 0.5
"""Sequences, and the part of them that no number between two of FP8 moves: nearly all."""


def random_tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, HF["vocab_size"], (ROWS, length)).astype(np.int32)


def test_logits(rng, write_checkpoint: WriteCheckpoint) -> None:
    """Whole sequences, with activations' scales as DeepSeek-V3.1 has them."""
    hf = HF | {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}
    stored, meant = in_fp8(hf_tensors(hf, rng), rng)
    model = in_float32(load_checkpoint(write_checkpoint(hf, stored), dtype="fp8"))
    tokens = random_tokens(rng, 3)
    run = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK_COMPILE)
    got = run(model, jnp.asarray(tokens))
    quantise = functools.partial(quantised, power_of_two=True)
    want, exact = (
        np.stack([Oracle(hf=hf, weights=meant, quantise=q).logits(row) for row in tokens])
        for q in (quantise, lambda x: x)
    )
    assert_rows_near(got, want, share=SHARE)
    # Against plain dequantised weights: activations of 3 bits after the first, in each product.
    assert np.median(np.abs(want - exact)) > 1e-2 * want.std()
    assert_within(got, exact, {0.5: 0.15 * want.std(), 0.9: 0.6 * want.std()})


def test_steps_over_the_cache(rng, write_checkpoint: WriteCheckpoint) -> None:
    """prefill and decode_step, which absorb wkv_b."""
    stored, meant = in_fp8(hf_tensors(HF, rng), rng)
    model = load_checkpoint(write_checkpoint(HF, stored), dtype="fp8")
    create = functools.partial(
        PagedLatentCache.create, num_pages=2 * ROWS, page_size=2, max_batch=ROWS, max_pages=2
    )
    assert create(model.config).ckv[0].dtype == jnp.bfloat16
    cache = create(model.config, dtype="float32")
    table = rng.permutation(2 * ROWS).reshape(ROWS, 2).astype(np.int32)
    cache = cache.with_rows(jnp.asarray(table), cache.lengths)
    tokens = random_tokens(rng, 3)
    model = in_float32(model)
    chunk, last = jnp.asarray(tokens[:, :2]), jnp.asarray(tokens[:, 2])
    second, cache = jax.jit(prefill, compiler_options=QUICK_COMPILE)(model, chunk, cache)
    third, cache = jax.jit(decode_step, compiler_options=QUICK_COMPILE)(model, last, cache)
    oracle = Oracle(hf=HF, weights=meant, quantise=quantised)
    want = np.stack([oracle.logits(row) for row in tokens])
    assert_rows_near(jnp.stack([second, third], axis=1), want[:, 1:], share=SHARE)


def leaves(model: Decoder) -> dict[str, jax.Array]:
    paths = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def test_weights_stay_fp8(rng, write_checkpoint: WriteCheckpoint) -> None:
    """Byte for byte what the files have, and no copy of it in another dtype."""
    stored, _ = in_fp8(hf_tensors(HF, rng), rng)
    path = write_checkpoint(HF, stored, shards=3)
    model = load_checkpoint(path, dtype="fp8")
    held = leaves(model)
    assert sum(leaf.nbytes for leaf in held.values()) == sum(t.nbytes for t in stored.values())
    in_fp8_bytes = sum(leaf.nbytes for leaf in held.values() if leaf.dtype == jnp.float8_e4m3fn)
    assert in_fp8_bytes == sum(
        t.nbytes for t in stored.values() if t.dtype == jnp.dtype(jnp.float8_e4m3fn)
    )
    weights = {
        ".".join(map(str, at)): node.get_value()
        for at, node in nnx.iter_graph(model)
        if isinstance(node, Weight)
    }
    assert all(isinstance(weight, BlockScaled) for weight in weights.values())
    experts = "model.layers.1.mlp.experts"
    for weight, index, name in (
        ("layers.0.attn.wkv_a.weight", ..., "model.layers.0.self_attn.kv_a_proj_with_mqa"),
        ("layers.0.ffn.gate_up", 1, "model.layers.0.mlp.up_proj"),
        ("layers.1.ffn.gate_up", (2, 0), f"{experts}.2.gate_proj"),
        ("layers.1.ffn.down", 3, f"{experts}.3.down_proj"),
        ("layers.1.ffn.shared.down.weight", ..., "model.layers.1.mlp.shared_experts.down_proj"),
    ):
        matrix = weights[weight][index]
        np.testing.assert_array_equal(
            np.asarray(matrix.values), stored[f"{name}.weight"], err_msg=name
        )
        np.testing.assert_array_equal(matrix.scales, stored[f"{name}.weight_scale_inv"])


def test_what_no_product_reads_becomes_bfloat16(rng, write_checkpoint: WriteCheckpoint) -> None:
    """A router in FP8, which DeepSeek's is not."""
    stored, _ = in_fp8(hf_tensors(HF, rng), rng)
    name = "model.layers.1.mlp.gate.weight"
    stored[name] = stored[name].astype(jnp.float8_e4m3fn)
    stored[name + "_scale_inv"] = np.full((1, 2), 0.5, np.float32)
    held = leaves(load_checkpoint(write_checkpoint(HF, stored), dtype="fp8"))
    weight = held["layers.1.ffn.router.weight"]
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(weight, float64(stored[name]) / 2)


# --- Files.


@pytest.mark.parametrize(
    ("settings", "block"),
    [({}, (128, 128)), ({"weight_block_size": [48, 40], "scale_fmt": "ue8m0"}, (48, 40))],
    ids=["default", "small-blocks"],
)
def test_saved_and_loaded_is_the_same(
    rng, tmp_path: Path, write_checkpoint: WriteCheckpoint, settings, block
) -> None:
    hf = ONE_LAYER | {"quantization_config": {"quant_method": "fp8"} | settings}
    stored, _ = in_fp8(hf_tensors(hf, rng), rng, block)
    model = load_checkpoint(write_checkpoint(hf, stored), dtype="fp8")
    save_checkpoint(model, tmp_path / "saved")
    tensors = read_headers(tmp_path / "saved")
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        saved_tensor = tensors[name].read(0, len(tensor))
        assert saved_tensor.dtype == tensor.dtype, name
        np.testing.assert_array_equal(saved_tensor, tensor, err_msg=name)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved["weight_block_size"] == list(block)
    assert saved.get("scale_fmt") == settings.get("scale_fmt")
    again = load_checkpoint(tmp_path / "saved", dtype="fp8")
    assert jax.tree.structure(again) == jax.tree.structure(model)


def test_fused_experts(rng, write_checkpoint: WriteCheckpoint) -> None:
    """Gate and up in one matrix: whole blocks each, or they cannot be told apart."""
    hf = HF | {"moe_intermediate_size": 256}
    fused, _ = in_fp8(fuse_experts(hf, hf_tensors(hf, rng)), rng)
    model = load_checkpoint(write_checkpoint(hf, fused, name="fused"), dtype="fp8")
    gate_up = model.layers[1].ffn.gate_up[...]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(
        np.asarray(gate_up.values).reshape(4, 512, 160), np.asarray(fused[name])
    )
    np.testing.assert_array_equal(
        np.asarray(gate_up.scales).reshape(4, 4, 2), fused[name + "_scale_inv"]
    )
    ragged, _ = in_fp8(fuse_experts(HF, hf_tensors(HF, rng)), rng)
    path = write_checkpoint(HF, ragged, name="ragged")
    with pytest.raises(CheckpointError, match=rf"{name}: gate and up have 144 rows each and scal"):
        load_checkpoint(path, dtype="fp8")


# --- A mesh.

# Two devices' rows, and columns, are whole blocks.
EVEN = ONE_LAYER | {
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


def test_on_a_mesh(rng, write_checkpoint: WriteCheckpoint) -> None:
    """Each of two devices has its rows, or columns, and their scales; activations' groups stay."""
    stored, meant = in_fp8(hf_tensors(EVEN, rng), rng)
    path = write_checkpoint(EVEN, stored)
    mesh = make_mesh(model=2)
    meshed = load_checkpoint(path, dtype="fp8", mesh=mesh)
    wo = meshed.layers[0].attn.wo.weight[...]
    assert wo.values.addressable_shards[0].data.shape == (160, 128)
    assert wo.scales.addressable_shards[1].data.shape == (2, 1)
    cache = PagedLatentCache.create(
        meshed.config,
        num_pages=ROWS,
        page_size=4,
        max_batch=ROWS,
        max_pages=1,
        dtype="float32",
        mesh=mesh,
    )
    tokens = random_tokens(rng, 3)
    with jax.set_mesh(mesh):
        run = jax.jit(prefill, compiler_options=QUICK_COMPILE)
        table = np.arange(ROWS, dtype=np.int32)[:, None]
        table = jax.device_put(table, cache.block_table.sharding)
        cache = cache.with_rows(table, cache.lengths)
        got, _ = run(in_float32(meshed), jnp.asarray(tokens), cache)
    oracle = Oracle(hf=EVEN, weights=meant, quantise=quantised)
    want = np.stack([oracle.logits(row)[-1] for row in tokens])
    assert_rows_near(got, want, share=SHARE)


def test_a_mesh_that_cuts_blocks(rng, write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(EVEN, in_fp8(hf_tensors(EVEN, rng), rng)[0])
    mesh = make_mesh(model=4)
    message = (
        r"^mesh: got model=4, which cuts blocks of FP8 weights \(160, 256\): "
        r"256 is not a multiple of 4 \* 128$"
    )
    model = load_checkpoint(path, dtype="fp8")
    for call in (
        lambda: load_checkpoint(path, dtype="fp8", mesh=mesh),
        lambda: shard_model(model, mesh),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- The command, and refusals.


def test_generate(rng, capsys, write_checkpoint: WriteCheckpoint) -> None:
    hf = ONE_LAYER | {"vocab_size": 256}
    path = write_checkpoint(hf, in_fp8(hf_tensors(hf, rng), rng)[0])
    prompts = ("--prompt", "The list", "--prompt", "A")
    arguments = ("--max-new-tokens", "5", "--ignore-eos", "--json")
    status, out, err = command(
        capsys, "generate", "--checkpoint", str(path), "--dtype", "fp8", *prompts, *arguments
    )
    assert status == 0, err
    made = [sequence["tokens"] for sequence in json.loads(out)["sequences"]]
    model = load_checkpoint(path, dtype="fp8")
    rows = [list(b"The list"), list(b"A")]
    assert made == mla_jax.generate(model, rows, max_new_tokens=5, ignore_eos=True)
    assert [len(row) for row in made] == [5, 5]


def without_fp8(hf: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    plain = {n: t.astype(jnp.bfloat16) for n, t in tensors.items() if not n.endswith("scale_inv")}
    return {k: v for k, v in hf.items() if k != "quantization_config"}, plain


def one_expert_in_bf16(hf: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    rest = {n: t for n, t in tensors.items() if n != name + "_scale_inv"}
    return hf, rest | {name: tensors[name].astype(jnp.bfloat16)}


def with_settings(**settings: str) -> Callable[..., tuple[dict[str, Any], Tensors]]:
    def change(hf: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        return hf | {"quantization_config": hf["quantization_config"] | settings}, tensors

    return change


def with_nan(hf: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    spoiled = tensors[name].copy()
    spoiled[5, 7] = np.nan
    return hf, tensors | {name: spoiled}


REFUSALS = {
    "no-fp8": (without_fp8, "dtype: got 'fp8', expected tensors in F8_E4M3, there are none"),
    "mixed": (
        one_expert_in_bf16,
        "not FP8, beside matrices that are: model.layers.1.mlp.experts.2.up_proj.weight",
    ),
    "scale_fmt": (
        with_settings(scale_fmt="int8"),
        "scale_fmt = 'int8' is not supported, expected 'ue8m0' or none",
    ),
    "activation_scheme": (
        with_settings(activation_scheme="static"),
        "activation_scheme = 'static' is not supported, expected 'dynamic'",
    ),
    "nan": (with_nan, "model.layers.1.mlp.experts.2.up_proj.weight: not finite in float8_e4m3fn"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(rng, write_checkpoint: WriteCheckpoint, change, message: str) -> None:
    path = write_checkpoint(*change(HF, in_fp8(hf_tensors(HF, rng), rng)[0]))
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(path))}\S*: {re.escape(message)}$"
    ):
        load_checkpoint(path, dtype="fp8")


def test_the_command_refuses_in_one_line(rng, capsys, write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(*without_fp8(HF, in_fp8(hf_tensors(HF, rng), rng)[0]))
    status, out, err = command(capsys, "generate", "--checkpoint", str(path), "--dtype", "fp8")
    assert (status, out) == (2, "")
    assert "expected tensors in F8_E4M3, there are none" in err
    assert "Traceback" not in err
