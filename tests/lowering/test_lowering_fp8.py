"""Kernels over float8_e4m3fn caches and weights lower for an H200."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from interpreted import needs_mosaic_gpu
from jax import ShapeDtypeStruct as Shape
from lowered import MOSAIC_CALL, TRITON_CALL, cuda, kernels, paged_shapes

from mla_jax import Decoder, ModelConfig, MoEConfig, PagedLatentCache, decode_step, presets
from mla_jax.config import MLAConfig
from mla_jax.nn.linear import Weight
from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

PAGED = ["mla_paged_attention", "mla_paged_merge"]
FP8 = jnp.float8_e4m3fn


@pytest.mark.parametrize("scaled", ["slot", "tensor", "tensor_kpe", "one"])
@pytest.mark.parametrize("heads", [16, 128])
def test_paged(heads, scaled):
    """bf16 queries over an fp8 cache, decode and prefill, by Triton."""
    for page_size, tokens in ((1, 1), (64, 1), (64, 4), (256, 1), (64, 0)):
        q_nope, q_pe, ckv, kpe, *requests = paged_shapes(heads, page_size, tokens)
        scales = Shape((*ckv.shape[:2], 4) if scaled == "slot" else (), jnp.float32)
        kpe = Shape(kpe.shape, FP8 if scaled == "tensor_kpe" else kpe.dtype)
        op = paged_decode if tokens else paged_prefill

        def run(scales, *args, op=op):
            given = None if scaled == "one" else scales
            return op(*args, sm_scale=0.07, kv_scales=given, backend="triton")

        shapes = (scales, q_nope, q_pe, Shape(ckv.shape, FP8), kpe, *requests)
        assert kernels(run, *shapes) == PAGED


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("heads", "page_size", "scaled"), [(16, 1, "slot"), (40, 64, "tensor_kpe")]
)
def test_mosaic(heads, page_size, scaled):
    """A tile's rows are gathered: pages of one token, many rows."""
    q_nope, q_pe, ckv, kpe, *requests = paged_shapes(heads, page_size, 1)
    scales = Shape((*ckv.shape[:2], 4) if scaled == "slot" else (), jnp.float32)
    kpe = Shape(kpe.shape, FP8 if scaled == "tensor_kpe" else kpe.dtype)

    def run(scales, *args):
        return paged_decode(*args, sm_scale=0.07, kv_scales=scales, backend="mosaic_gpu")

    shapes = (scales, q_nope, q_pe, Shape(ckv.shape, FP8), kpe, *requests)
    assert len(MOSAIC_CALL.findall(cuda(run, *shapes))) == 2


@needs_mosaic_gpu
@pytest.mark.parametrize("heads", [1, 16, 17, 32])
def test_packed(heads, rng):
    """Keys that consumers unpack fit in shared memory, whatever their scales and pages."""
    for scaled in ("slot", "tensor", "tensor_kpe"):
        for latent, rope in ((512, 64), (512, 0), (384, 64), (128, 64)):
            page_size = int(rng.choice([8, 32, 64, 256]))
            dtype = str(rng.choice(["bfloat16", "float16"]))
            q_nope, q_pe, ckv, kpe, *requests = paged_shapes(
                heads, page_size, 1, dtype, latent=latent, rope=rope
            )
            groups = (*ckv.shape[:2], latent // 128) if scaled == "slot" else ()
            kpe = Shape(kpe.shape, FP8 if scaled == "tensor_kpe" else kpe.dtype)

            def run(scales, *args):
                return paged_decode(*args, sm_scale=0.07, kv_scales=scales, backend="mosaic_gpu")

            shapes = (Shape(groups, jnp.float32), q_nope, q_pe, Shape(ckv.shape, FP8), kpe)
            assert len(MOSAIC_CALL.findall(cuda(run, *shapes, *requests))) == 2


def test_decode_step():
    config = ModelConfig(
        vocab=512, n_layers=2, inter_dim=256, n_dense=2, mla=MLAConfig(dim=256, n_heads=16)
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(
        lambda: PagedLatentCache.create(
            config, num_pages=64, max_batch=4, max_pages=16, dtype="float8_e4m3fn"
        )
    )
    definition, weights = nnx.split(model)

    def step(weights, tokens, cache):
        return decode_step(nnx.merge(definition, weights), tokens, cache)

    names = kernels(step, weights, Shape((4,), jnp.int32), cache)
    assert names.count("mla_paged_attention") == config.n_layers


def in_fp8(model: Decoder) -> Decoder:
    """The shapes of a model whose matrices stay FP8."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Weight):
            node.set_value(BlockScaled.of_shape(node.shape))
    return model


@pytest.mark.parametrize("tokens", [1, 32, 512])
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_experts(name, tokens):
    """No expert is unpacked outside of the kernels, nor reordered."""
    config = presets[name]
    moe, dim = config.moe, config.mla.dim
    assert moe is not None
    wide, inter = moe.n_shared * moe.inter_dim, moe.inter_dim
    program = cuda(
        expert_ffn,
        Shape((tokens, dim), jnp.bfloat16),
        Shape((tokens, moe.n_active), jnp.int32),
        Shape((tokens, moe.n_active), jnp.float32),
        BlockScaled.of_shape((moe.n_routed, 2, inter, dim)),
        BlockScaled.of_shape((moe.n_routed, dim, inter)),
        (BlockScaled.of_shape((2, wide, dim)), BlockScaled.of_shape((dim, wide))),
    )
    assert TRITON_CALL.findall(program) == ["moe_hidden", "moe_output"]
    stack = f"{moe.n_routed}x2x{inter}x{dim}x"
    assert f"<{stack}f8E4M3FN>" in program
    assert f"<{stack}bf16>" not in program
    assert f"<{stack}f32>" not in program


def test_decode_step_with_weights_in_fp8():
    config = ModelConfig(
        vocab=512,
        n_layers=2,
        inter_dim=256,
        n_dense=1,
        mla=MLAConfig(dim=256, n_heads=16, q_lora_rank=128),
        moe=MoEConfig(n_routed=8, n_active=2, inter_dim=128, n_shared=1),
    )
    model = in_fp8(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(
        lambda: PagedLatentCache.create(config, num_pages=64, max_batch=4, max_pages=16)
    )
    names = kernels(decode_step, model, Shape((4,), jnp.int32), cache)
    assert names.count("mla_paged_attention") == config.n_layers
    assert names[-3:] == ["moe_route", "moe_hidden", "moe_output"]
