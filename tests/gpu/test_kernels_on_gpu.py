"""The expert layer and the whole step on the chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import assert_within, make_experts, mixture, routing

from mla_jax import Decoder, presets
from mla_jax.bench.timing import compilations
from mla_jax.generate import decode_block, generate
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.routing import RoutingRule, route

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU; this run has none"
)

# Of outputs of about unit size: the inputs' rounding is the oracle's too, the result's is not.
BOUNDS = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 8e-3, 1.0: 3e-2},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 32, 200])
def test_expert_ffn(rng, tokens, dtype):
    ids = np.stack([rng.permutation(16)[:4] for _ in range(tokens)])
    case = make_experts(rng, ids, experts=16, inter=96, dim=128, dtype=dtype, shared=2)
    out = jax.jit(lambda *args: expert_ffn(*args, backend="triton"))(*case.args)
    scale = np.abs(mixture(case)).max()
    assert_within(out / out.dtype.type(scale), mixture(case) / scale, BOUNDS[dtype])


@pytest.mark.parametrize(
    ("experts", "rule", "biased"),
    [
        (64, RoutingRule(active=6), False),
        (160, RoutingRule(active=6, groups=8, limited_groups=3, scale=16.0), False),
        (
            256,
            RoutingRule(
                active=8, groups=8, limited_groups=4, score="sigmoid", normalize=True, scale=2.5
            ),
            True,
        ),
    ],
)
def test_route(rng, experts, rule, biased):
    logits = rng.standard_normal((50, experts)).astype(np.float32)
    bias = rng.standard_normal(experts).astype(np.float32) * 0.2 if biased else None
    ids, weights = route(
        jnp.asarray(logits), None if bias is None else jnp.asarray(bias), rule, backend="triton"
    )
    want_ids, want_weights = routing(logits, bias, **dataclasses.asdict(rule))
    np.testing.assert_array_equal(np.asarray(ids), want_ids)
    np.testing.assert_allclose(np.asarray(weights), want_weights, rtol=1e-5)


def test_greedy_tokens_do_not_depend_on_the_backend(seed, rng):
    model = Decoder(presets["tiny"], rngs=nnx.Rngs(seed))
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 70, 200)]
    made = {
        backend: generate(
            model, prompts, max_new_tokens=64, backend=backend, ignore_eos=True, page_size=16
        )
        for backend in (None, "triton", "reference")
    }
    assert made[None] == made["triton"] == made["reference"]


def test_one_program_serves_all_lengths(seed):
    model = Decoder(presets["tiny"], rngs=nnx.Rngs(seed))
    before = compilations(decode_block)
    generate(model, [[1], [2, 3]], max_new_tokens=200, ignore_eos=True)
    assert compilations(decode_block) == before + 1
