"""Lowering for GPUs that are not there: the devices, the shapes of calls, and what they launch."""

import re

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.sharding import AbstractDevice, AbstractMesh


def only(kind: str, cores: int, platform: str = "gpu") -> AbstractMesh:
    """A mesh of one device of this kind, for `jax.sharding.use_abstract_mesh`."""
    return AbstractMesh((), (), abstract_device=AbstractDevice(kind, cores, platform))


H200 = only("NVIDIA H200", 132)
A100 = only("NVIDIA A100-SXM4-80GB", 108)

TRITON_CALL = re.compile(r'custom_call @__gpu\$xla\.gpu\.triton\(.*\bname = "(\w+)"')
MOSAIC_CALL = re.compile(r"custom_call @mosaic_gpu\w*\(")


def cuda(function, *args) -> str:
    """The program that `function` becomes on a CUDA device."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(function, *args) -> list[str]:
    """The names of the Triton kernels that `function` launches, in order."""
    return TRITON_CALL.findall(cuda(function, *args))


def ints(size: int) -> Shape:
    return Shape((size,), jnp.int32)


def paged_shapes(
    heads: int,
    page_size: int,
    tokens: int,
    dtype: str = "bfloat16",
    *,
    batch: int = 4,
    latent: int = 512,
    rope: int = 64,
):
    """Those of a decode call, or, without `tokens` of each request, of a prefill call."""
    rows = (batch, tokens) if tokens else (300,)
    return (
        Shape((*rows, heads, latent), dtype),
        Shape((*rows, heads, rope), dtype),
        Shape((1000, page_size, latent), dtype),
        Shape((1000, page_size, rope), dtype),
        *(ints(batch * 64), ints(batch), ints(batch)),
        *(() if tokens else (ints(batch), ints(batch))),
    )
