"""Meshes, layouts, and checkpoints that are read shard by shard."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshed import CONFIG, SHAPES, label, mesh_of, model

from mla_jax import MLA, Decoder, MLAConfig, load_checkpoint, presets, save_checkpoint, sharding
from mla_jax._safetensors import StoredTensor
from mla_jax.sharding.layout import spec


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


# Which axis of a parameter is split over `model`, by the end of its name; others are whole.
SPLIT = {
    "attn.wq_b.weight": 0,
    "attn.wq.weight": 0,
    "attn.wkv_b.weight": 0,
    "attn.wo.weight": 1,
    "layers.0.ffn.gate_up": 1,
    "layers.0.ffn.down.weight": 1,
    "layers.1.ffn.gate_up": 0,
    "layers.1.ffn.down": 0,
    "shared.gate_up": 1,
    "shared.down.weight": 1,
    "head": 0,
}


def assert_laid_out(sharded: Decoder, whole: Decoder, parts: int) -> None:
    """Each device holds the slice that the layout gives it, and nothing else."""
    expected = arrays(whole)
    for name, array in arrays(sharded).items():
        values = np.asarray(expected[name])
        axis = next((axis for end, axis in SPLIT.items() if name.endswith(end)), None)
        shape = list(values.shape)
        if axis is not None:
            shape[axis] //= parts
        assert len(array.addressable_shards) == 8, name
        for shard in array.addressable_shards:
            assert shard.data.shape == tuple(shape), name
            want = values
            if axis is not None:
                rank = shard.device.id % parts  # `model` is the mesh's last axis
                want = np.split(values, parts, axis=axis)[rank]
            np.testing.assert_array_equal(np.asarray(shard.data), want, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_the_layout(seed, shape):
    assert_laid_out(sharding.shard_model(model(seed), mesh_of(shape)), model(seed), shape["model"])


def test_a_layer_alone(seed):
    config = MLAConfig(dim=32, n_heads=4, kv_lora_rank=16, dtype="float32")
    layer = MLA(config, rngs=nnx.Rngs(seed))
    sharded = sharding.shard_model(layer, mesh_of({"model": 4}))
    assert sharded.wq.weight.get_value().sharding.spec == P("model")
    assert sharded.wkv_a.weight.get_value().sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"^mesh: got model=8, expected a divisor of n_heads=4$"):
        sharding.shard_model(layer, mesh_of({"model": 8}))


@pytest.mark.parametrize(
    "shape", [{"data": 2, "model": 4}, {"model": 2, "context": 4}, {"model": 8}], ids=label
)
def test_a_checkpoint_goes_to_its_devices(seed, tmp_path, shape):
    save_checkpoint(model(seed), tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m", mesh=mesh_of(shape))
    assert_laid_out(loaded, model(seed), shape["model"])


def test_no_more_is_read_than_this_process_needs(seed, tmp_path, monkeypatch):
    """A device alone reads its own rows, and each once though there are several of its layout."""
    save_checkpoint(model(seed), tmp_path / "m")
    read: list[tuple[str, int, int]] = []
    whole_read = StoredTensor.read

    def noted(self, start, stop):
        read.append((self.name, start, stop))
        return whole_read(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read", noted)
    load_checkpoint(tmp_path / "m", mesh=mesh_of({"data": 2, "model": 4}))
    assert len(set(read)) == len(read)
    rows = [(start, stop) for name, start, stop in read if name == "lm_head.weight"]
    assert rows == [(0, 64), (64, 128), (128, 192), (192, 256)]
    experts = [name for name, _, _ in read if ".experts." in name]
    assert len(experts) == 8 * 3  # every one goes to two devices, and is read for both at once


FP8_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "dtype": "float32",
    "vocab_size": 32,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 12]},
}


def test_blocks_of_scales_that_straddle_devices(rng, write_checkpoint, seed):
    """Four devices' rows and columns end inside blocks of 16 x 12: both need the block's scale."""
    import ml_dtypes
    from test_checkpoint import hf_tensors

    tensors: dict[str, np.ndarray] = {}
    for name, value in hf_tensors(FP8_CONFIG, rng).items():
        tensors[name] = value
        if value.ndim == 2 and "_proj" in name:
            rows, columns = (
                -(-size // block) for size, block in zip(value.shape, (16, 12), strict=True)
            )
            tensors[name] = value.astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = rng.uniform(0.5, 2, (rows, columns)).astype(np.float32)
    path = write_checkpoint(FP8_CONFIG, tensors)
    whole = arrays(load_checkpoint(path, dtype="float32"))
    for name, array in arrays(
        load_checkpoint(path, dtype="float32", mesh=mesh_of({"model": 4}))
    ).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[name]), err_msg=name)
        if name.endswith("wo.weight"):
            assert array.addressable_shards[1].data.shape == (40, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 260}, "vocab=260"),
        ({"inter_dim": 516}, "inter_dim=516"),
        ({"mla": {"n_heads": 12}}, "n_heads=12"),
        ({"moe": {"n_routed": 12}}, "moe.n_routed=12"),
        ({"moe": {"inter_dim": 100}}, r"moe.n_shared \* moe.inter_dim=100"),
    ],
)
def test_what_a_mesh_does_not_divide(tmp_path, changes, message):
    changes = {
        name: dataclasses.replace(getattr(CONFIG, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    config = dataclasses.replace(CONFIG, **changes)
    save_checkpoint(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "m")
    sharding.check_mesh(config, mesh_of({"model": 4}))
    mesh = mesh_of({"model": 8})
    for call in (
        lambda: sharding.check_mesh(config, mesh),
        lambda: sharding.shard_model(Decoder(config, rngs=nnx.Rngs(0)), mesh),
        lambda: load_checkpoint(tmp_path / "m", mesh=mesh),
    ):
        with pytest.raises(
            ValueError, match=rf"^mesh: got model=8, expected a divisor of {message}$"
        ):
            call()


def test_a_tied_head_is_not_split():
    config = dataclasses.replace(CONFIG, tie_embeddings=True, vocab=257)
    sharding.check_mesh(config, mesh_of({"model": 8}))


@pytest.mark.parametrize("name", [name for name in presets if name != "tiny"])
def test_the_presets_fit_eight_devices(name):
    sharding.check_mesh(presets[name], mesh_of({"model": 8}))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"model": -1}, {"context": 0}])
def test_a_size_below_one(sizes):
    ((name, size),) = sizes.items()
    with pytest.raises(ValueError, match=rf"^{name}: got {size}, expected at least 1$"):
        sharding.make_mesh(**sizes)


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"^make_mesh: got data=2 \* context=1 \* model=8, .* 8 "):
        sharding.make_mesh(data=2, model=8)
    with pytest.raises(ValueError, match=r"the 2 devices there are$"):
        sharding.make_mesh(model=4, devices=jax.devices()[:2])


def test_fewer_devices_than_there_are():
    mesh = sharding.make_mesh(model=2, devices=jax.devices()[4:])
    assert [device.id for device in mesh.devices.flat] == [4, 5]


def test_a_spec_has_one_form():
    mesh = mesh_of({"data": 2, "model": 4})
    assert spec(mesh, None, "model", None) == P(None, "model")
    assert spec(mesh, ("data", "context")) == P("data")
    assert spec(mesh, "context", None) == P()
    assert spec(mesh, "no such axis") == P()
