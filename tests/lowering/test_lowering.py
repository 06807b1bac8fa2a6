"""Every kernel lowers for an H200 on a machine without a GPU, and so does the decode step.

Lowering runs the Triton front end: primitives that it lacks, sizes that are no power of two and
types that do not fit are found here. Only shapes are made, so that a big model costs nothing.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Shape
from jax.sharding import AbstractDevice, AbstractMesh

from mla_jax import Decoder, ModelConfig, MoEConfig, PagedLatentCache, decode_step, presets
from mla_jax.config import MLAConfig
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.routing import RoutingRule, route

TRITON_CALL = re.compile(r'custom_call @__gpu\$xla\.gpu\.triton\(.*\bname = "(\w+)"')


@pytest.fixture(autouse=True)
def h200():
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def kernels(function, *args) -> list[str]:
    """The names of the Triton kernels that `function` launches, in order."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return TRITON_CALL.findall(lowered.as_text())


def paged_shapes(heads: int, page_size: int, tokens: int, dtype: str, batch: int = 4):
    def ints(size: int) -> Shape:
        return Shape((size,), jnp.int32)

    return (
        Shape((batch, tokens, heads, 512), dtype),
        Shape((batch, tokens, heads, 64), dtype),
        Shape((1000, page_size, 512), dtype),
        Shape((1000, page_size, 64), dtype),
        *(ints(batch * 64), ints(batch), ints(batch)),
    )


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_paged_decode(heads, page_size):
    """Nobody names Triton here: on a GPU it is what a call gets."""
    for dtype, tokens in itertools.product(("float32", "bfloat16", "float16"), (1, 4)):
        shapes = paged_shapes(heads, page_size, tokens, dtype)
        names = kernels(lambda *args: paged_decode(*args, sm_scale=0.07), *shapes)
        assert names[0] == "mla_paged_decode"


@pytest.mark.parametrize("num_splits", [1, 3, 64])
def test_paged_decode_splits(num_splits):
    def run(*args):
        return paged_decode(*args, sm_scale=0.07, num_splits=num_splits)

    merge = ["mla_merge"] if num_splits > 1 else []
    assert kernels(run, *paged_shapes(16, 64, 1, "bfloat16")) == ["mla_paged_decode", *merge]


@pytest.mark.parametrize("tokens", [1, 32, 128])
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_experts(name, tokens):
    config = presets[name]
    moe, dim = config.moe, config.mla.dim
    assert moe is not None
    rule = RoutingRule(
        active=moe.n_active,
        groups=moe.n_groups,
        limited_groups=moe.n_limited_groups,
        score=moe.score,
        normalize=moe.normalize,
        scale=moe.route_scale,
    )
    wide = moe.n_shared * moe.inter_dim

    def run(x, logits, bias, gate_up, down, shared):
        ids, weights = route(logits, bias, rule)
        return expert_ffn(x, ids, weights, gate_up, down, shared)

    shapes = (
        Shape((tokens, dim), jnp.bfloat16),
        Shape((tokens, moe.n_routed), jnp.float32),
        Shape((moe.n_routed,), jnp.float32) if moe.score == "sigmoid" else None,
        Shape((moe.n_routed, 2, moe.inter_dim, dim), jnp.bfloat16),
        Shape((moe.n_routed, dim, moe.inter_dim), jnp.bfloat16),
        (Shape((2, wide, dim), jnp.bfloat16), Shape((dim, wide), jnp.bfloat16)),
    )
    assert kernels(run, *shapes) == ["moe_route", "moe_hidden", "moe_output"]


@pytest.mark.parametrize("batch", [1, 32])
def test_decode_step(batch):
    """V2-Lite's attention; a dense layer and one of experts, all small."""
    config = ModelConfig(
        vocab=512,
        n_layers=2,
        inter_dim=256,
        n_dense=1,
        mla=MLAConfig(dim=256, n_heads=16),
        moe=MoEConfig(n_routed=8, n_active=2, inter_dim=128, n_shared=1),
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(
        lambda: PagedLatentCache.create(config, num_pages=4096, max_batch=batch, max_pages=64)
    )
    definition, weights = nnx.split(model)

    def step(weights, tokens, cache):
        return decode_step(nnx.merge(definition, weights), tokens, cache)

    names = kernels(step, weights, Shape((batch,), jnp.int32), cache)
    assert names.count("mla_paged_decode") == config.n_layers
    assert names[-3:] == ["moe_route", "moe_hidden", "moe_output"]
