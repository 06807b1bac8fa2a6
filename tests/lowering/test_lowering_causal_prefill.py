"""Causal prefill's kernels lower for an H200 on a machine without a GPU, both passes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from lowered import kernels

from pallas_kernels.causal_prefill import CausalProblem, causal_prefill
from pallas_kernels.causal_prefill.tiles import (
    SHARED_BYTES,
    BackwardTiles,
    CausalTiles,
    choose_backward_tiles,
    choose_tiles,
)
from pallas_kernels.causal_prefill.triton import causal_prefill_triton
from pallas_kernels.device import current_device

FORWARD = ["mla_causal_prefill"]
BOTH = [*FORWARD, "mla_causal_prefill_dq", "mla_causal_prefill_dkv"]


def shapes(tokens: int, heads: int, dtype: str, batch: int = 1, width: int = 192, value=128):
    rows = [Shape((tokens, heads, last), dtype) for last in (width, width, value)]
    return (*rows, *[Shape((batch,), jnp.int32)] * 4)


def gradient(function):
    """The gradient by q, k and v of a sum of both results."""

    def loss(*args):
        out, lse = function(*args)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tokens", "heads", "batch"), [(1, 1, 1), (300, 16, 8), (8192, 16, 1), (8192, 128, 40)]
)
def test_chosen_tiles(tokens, heads, batch, dtype):
    """Nobody names Triton here: on a GPU it is what a call gets."""

    def run(*args):
        return causal_prefill(*args, sm_scale=0.07)

    args = shapes(tokens, heads, dtype, batch)
    assert kernels(run, *args) == FORWARD
    assert kernels(gradient(run), *args) == BOTH


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("width", "value"), [(16, 16), (48, 256), (64, 64), (96, 32), (128, 128), (256, 256)]
)
def test_widths(width, value, causal):
    def run(*args):
        return causal_prefill(*args, sm_scale=0.07, causal=causal)

    args = shapes(4096, 8, "bfloat16", 3, width, value)
    assert kernels(gradient(run), *args) == BOTH


@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("keys", [32, 64, 128])
@pytest.mark.parametrize("rows", [32, 64, 128])
def test_tiles(rows, keys, num_warps):
    """Those that a sweep tries."""
    tiles = CausalTiles(rows=rows, keys=keys, num_warps=num_warps, num_stages=2)

    run = functools.partial(
        causal_prefill_triton,
        sm_scale=jnp.float32(0.07),
        causal=True,
        interpret=False,
        tiles=tiles,
        backward_tiles=BackwardTiles(dq=tiles, dkv=tiles),
    )
    assert kernels(gradient(run), *shapes(2048, 16, "bfloat16", 2)) == BOTH


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "value"), [(16, 16), (192, 128), (256, 256)])
def test_chosen_tiles_fit(width, value, dtype):
    """What the blocks hold and stream fits a core's shared memory."""
    for tokens in (64, 1 << 15):
        problem = CausalProblem(
            batch=1,
            tokens=tokens,
            keys=tokens,
            heads=16,
            width=width,
            value_width=value,
            dtype=dtype,
            causal=True,
        )
        both, itemsize = width + value, jnp.dtype(dtype).itemsize
        forward, backward = choose_tiles(problem, current_device()), choose_backward_tiles(problem)
        for tiles, held, streamed in (
            (forward, forward.rows * width, forward.keys * both),
            (backward.dq, backward.dq.rows * both, backward.dq.keys * both),
            (backward.dkv, backward.dkv.keys * both, backward.dkv.rows * both),
        ):
            assert (held + tiles.num_stages * streamed) * itemsize <= SHARED_BYTES
