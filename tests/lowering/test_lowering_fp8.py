"""Kernels over float8_e4m3fn caches lower for an H200."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from interpreted import needs_mosaic_gpu
from jax import ShapeDtypeStruct as Shape
from lowered import MOSAIC_CALL, cuda, kernels, paged_shapes

from mla_jax import Decoder, ModelConfig, PagedLatentCache, decode_step
from mla_jax.config import MLAConfig
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

PAGED = ["mla_paged_attention", "mla_paged_merge"]
FP8 = jnp.float8_e4m3fn


@pytest.mark.parametrize("scaled", ["slot", "tensor", "tensor_kpe", "one"])
@pytest.mark.parametrize("heads", [16, 128])
def test_paged(heads, scaled):
    """bf16 queries over an fp8 cache, decode and prefill; no backend named means Triton."""
    for page_size, tokens in ((1, 1), (64, 1), (64, 4), (256, 1), (64, 0)):
        q_nope, q_pe, ckv, kpe, *requests = paged_shapes(heads, page_size, tokens)
        scales = Shape((*ckv.shape[:2], 4) if scaled == "slot" else (), jnp.float32)
        kpe = Shape(kpe.shape, FP8 if scaled == "tensor_kpe" else kpe.dtype)
        op = paged_decode if tokens else paged_prefill

        def run(scales, *args, op=op):
            return op(*args, sm_scale=0.07, kv_scales=None if scaled == "one" else scales)

        shapes = (scales, q_nope, q_pe, Shape(ckv.shape, FP8), kpe, *requests)
        assert kernels(run, *shapes) == PAGED


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("heads", "page_size", "scaled"), [(16, 64, "slot"), (40, 1, "tensor_kpe")]
)
def test_mosaic(heads, page_size, scaled):
    """Pages of any size: a tile's rows are gathered."""
    q_nope, q_pe, ckv, kpe, *requests = paged_shapes(heads, page_size, 1)
    scales = Shape((*ckv.shape[:2], 4) if scaled == "slot" else (), jnp.float32)
    kpe = Shape(kpe.shape, FP8 if scaled == "tensor_kpe" else kpe.dtype)

    def run(scales, *args):
        return paged_decode(*args, sm_scale=0.07, kv_scales=scales, backend="mosaic_gpu")

    shapes = (scales, q_nope, q_pe, Shape(ckv.shape, FP8), kpe, *requests)
    assert len(MOSAIC_CALL.findall(cuda(run, *shapes))) == 2


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
