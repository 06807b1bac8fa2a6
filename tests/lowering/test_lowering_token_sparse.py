"""Token-sparse attention lowers for an H200 on a machine without a GPU."""

import jax.numpy as jnp
import pytest
from interpreted import needs_mosaic_gpu
from jax import ShapeDtypeStruct as Shape
from lowered import MOSAIC_CALL, cuda, kernels

from pallas_kernels.token_sparse import token_sparse

SPLIT = ["mla_paged_attention", "mla_paged_merge"]


def shapes(queries, heads, topk, dtype="bfloat16", *, latent=512, rope=64, cache=None):
    slots, kpe = (1000, 64), dtype if cache == "slot" else cache or dtype
    return (
        Shape((queries, heads, latent), dtype),
        Shape((queries, heads, rope), dtype),
        Shape((*slots, latent), jnp.float8_e4m3fn if cache else dtype),
        Shape((*slots, rope), kpe),
        Shape((queries, topk), jnp.int32),
    )


def lowered(*args, **options) -> list[str]:
    return kernels(
        lambda *args: token_sparse(*args, sm_scale=0.07, backend="triton", **options), *args
    )


@pytest.mark.parametrize("heads", [1, 16, 32, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads(heads, dtype):
    """A decode step's queries, and a prefill's."""
    for queries, topk in ((8, 2048), (700, 64)):
        assert lowered(*shapes(queries, heads, topk, dtype)) == SPLIT


@pytest.mark.parametrize(("latent", "rope"), [(16, 0), (256, 32)])
def test_widths(latent, rope):
    assert lowered(*shapes(8, 16, 128, latent=latent, rope=rope)) == SPLIT


@pytest.mark.parametrize(
    ("options", "launched"),
    [({"num_splits": 1}, 1), ({"num_splits": 4}, 2), ({"deterministic": True}, 2)],
)
def test_options(options, launched):
    assert lowered(*shapes(8, 128, 2048), **options) == SPLIT[:launched]


@needs_mosaic_gpu
@pytest.mark.parametrize(("heads", "cache"), [(16, None), (128, "slot")])
def test_mosaic(heads, cache):
    scales = Shape((1000, 64, 4), jnp.float32) if cache else None

    def run(scales, *args):
        return token_sparse(*args, sm_scale=0.07, kv_scales=scales, backend="mosaic_gpu")

    text = cuda(run, scales, *shapes(256, heads, 2048, cache=cache))
    assert len(MOSAIC_CALL.findall(text)) == 2


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("layout", ["slot", "tensor"])
def test_fp8_cache(heads, layout):
    scales = Shape((1000, 64, 4) if layout == "slot" else (), jnp.float32)
    args = shapes(256, heads, 2048, cache="slot" if layout == "slot" else jnp.float8_e4m3fn)
    launched = kernels(
        lambda scales, *args: token_sparse(
            *args, sm_scale=0.07, kv_scales=scales, backend="triton"
        ),
        scales,
        *args,
    )
    assert launched == SPLIT
