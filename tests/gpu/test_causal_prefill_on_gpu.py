"""Causal prefill on the chip, both passes, at DeepSeek's widths: 192 for keys, 128 for values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_within, float64
from ragged import RaggedCase, attention, dense_loss, make_ragged

from pallas_kernels.causal_prefill import causal_prefill

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU; this run has none"
)

SM_SCALE = 192**-0.5
WIDTHS = {"width": 192, "value_width": 128}
BOUNDS = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 2e-2, 1.0: 5e-2},
    "float16": {0.99: 2e-3, 1.0: 6e-3},
}
LSE = {"float32": {1.0: 1e-4}, "bfloat16": {1.0: 1e-3}, "float16": {1.0: 1e-3}}
# Of a gradient's norm.
GRADIENT = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}

CASES = {
    "ragged": [(0, 0), (1, 1), (5, 0), (129, 128), (0, 9), (64, 64), (3, 400), (257, 300)],
    "chunk": [(300, 1500)],
    "whole": [(1024, 1024)],
}


def forward(causal: bool):
    return functools.partial(causal_prefill, sm_scale=SM_SCALE, causal=causal, backend="triton")


def gradients(case: RaggedCase, weights, lse_weights, causal: bool):
    """Those of sum(out weights) + sum(lse lse_weights) by q, k and v: the kernels', and dense."""

    def loss(q, k, v):
        out, lse = forward(causal)(q, k, v, *case.args[3:])
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return (out.astype(jnp.float32) * weights).sum() + (lse * lse_weights).sum()

    dense = functools.partial(dense_loss, case=case, sm_scale=SM_SCALE, causal=causal)
    inputs = case.args[:3]
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)
    exact = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))
    return got, exact(*(x.astype(jnp.float32) for x in inputs), weights, lse_weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_forward(rng, name, causal, dtype):
    case = make_ragged(rng, CASES[name], heads=3, dtype=dtype, **WIDTHS)
    out, lse = jax.jit(forward(causal))(*case.args)
    want_out, want_lse = attention(case, SM_SCALE, causal)
    assert out.dtype == case.q.dtype
    assert_within(out, want_out, BOUNDS[dtype])
    assert_within(lse, want_lse, LSE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_backward(rng, name, causal, dtype):
    case = make_ragged(rng, CASES[name], heads=3, dtype=dtype, **WIDTHS)
    shape = (*case.q.shape[:2], case.v.shape[2])
    weights = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    lse_weights = jnp.asarray(rng.standard_normal(shape[:2]), jnp.float32)
    got, want = gradients(case, weights, lse_weights, causal)
    for ours, exact, array in zip(got, want, case.args[:3], strict=True):
        assert ours.dtype == array.dtype
        ours, exact = float64(ours), float64(exact)
        assert np.linalg.norm(ours - exact) <= GRADIENT[dtype] * max(np.linalg.norm(exact), 1.0)
        unused = np.isnan(float64(array)).any(axis=(1, 2))
        np.testing.assert_array_equal(ours[unused], 0.0)


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (96, 64), (128, 128), (256, 256)])
def test_other_widths(rng, width, value_width):
    case = make_ragged(
        rng, CASES["ragged"], heads=2, width=width, value_width=value_width, dtype="bfloat16"
    )
    out, lse = jax.jit(forward(True))(*case.args)
    want_out, want_lse = attention(case, SM_SCALE, True)
    assert_within(out, want_out, BOUNDS["bfloat16"])
    assert_within(lse, want_lse, LSE["bfloat16"])


def test_a_call_repeats_itself(rng):
    """Both passes: the same call gives the same bits."""
    case = make_ragged(rng, CASES["ragged"], heads=3, dtype="bfloat16", **WIDTHS)

    @jax.jit
    def run(q, k, v):
        results, vjp = jax.vjp(lambda *qkv: forward(True)(*qkv, *case.args[3:]), q, k, v)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    first = run(*case.args[:3])
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(*case.args[:3]), first)
