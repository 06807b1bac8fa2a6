"""What `bench sharded` times, at its real sizes, lowers for four H200."""

import dataclasses
import math

import jax
import pytest
from interpreted import MOSAIC_GPU
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from lowered import MOSAIC_CALL, TRITON_CALL

from mla_jax.bench import link, sharded, timing
from mla_jax.bench import sharded_programs as programs

SIZES = sharded.Sizes()
DEVICE = AbstractDevice("NVIDIA H200", 132, "gpu")
DEVICES = 4


def mesh_of(**sizes: int) -> AbstractMesh:
    axes = ("data", "context", "model")
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in axes), axes, abstract_device=DEVICE)


def lowered(make, mesh: AbstractMesh, *sizes) -> str:
    """The program as every device of `mesh` gets it."""
    program = make(mesh, *sizes)
    with use_abstract_mesh(mesh):
        traced = jax.jit(program.function, donate_argnums=1).trace(*program.args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(autouse=True)
def two_calls(monkeypatch):
    monkeypatch.setattr(timing, "CALLS", 2)


def decode_kernels(text: str) -> int:
    return len(MOSAIC_CALL.findall(text)) + TRITON_CALL.findall(text).count("mla_paged_attention")


@pytest.mark.parametrize("devices", [1, DEVICES])
def test_heads(devices):
    mesh, heads = mesh_of(model=devices), SIZES.layer.n_heads // DEVICES * devices
    kernel = lowered(programs.attention_by_heads, mesh, heads, SIZES.batch, SIZES.length)
    layer = dataclasses.replace(SIZES.layer, n_heads=heads)
    whole = lowered(programs.layer_by_heads, mesh, layer, SIZES.batch, SIZES.length)
    for text in (kernel, whole):
        assert decode_kernels(text) >= 1  # in a function that every call of a chain shares
        assert bool(MOSAIC_CALL.search(text)) == MOSAIC_GPU
        # A device's own share, whichever mesh it is on.
        assert f"tensor<{SIZES.batch}x1x{heads // devices}x512xbf16>" in text
    assert whole.count("all_reduce") == (2 if devices > 1 else 0)
    assert "all_reduce" not in kernel


@pytest.mark.parametrize("length", SIZES.contexts)
def test_context(length):
    text = lowered(programs.attention_by_context, mesh_of(context=DEVICES), SIZES.layer, length)
    assert decode_kernels(text) >= 2
    assert text.count("stablehlo.all_gather") == 2
    assert f"tensor<{math.ceil(length / 64 / DEVICES)}x64x512xbf16>" in text


@pytest.mark.parametrize("devices", [1, 2, DEVICES])
def test_steps(devices):
    """Of few layers: every one but the first is the same."""
    config = dataclasses.replace(SIZES.model, n_layers=2)
    batch, length = max(SIZES.step_batches), SIZES.step_length
    text = lowered(programs.block_of_steps, mesh_of(model=devices), config, batch, length)
    assert decode_kernels(text) >= 2
    assert TRITON_CALL.search(text)  # the experts


def test_sums():
    for rows in (*SIZES.link.decode, *SIZES.link.large):
        text = lowered(link.sums, mesh_of(model=DEVICES), rows, SIZES.link.dim)
        assert text.count("all_reduce") == 2
        assert f"tensor<{rows}x{SIZES.link.dim}xbf16>" in text
