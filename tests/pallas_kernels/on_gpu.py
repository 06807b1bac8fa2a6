"""Which GPU tests can run here, and the backends of decode that they run."""

import jax
import pytest

from pallas_kernels.device import current_device
from pallas_kernels.paged_decode.mosaic_gpu import OLDEST_JAX

needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU; this run has none"
)
needs_hopper = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX or not current_device().is_hopper,
    reason=f"needs a Hopper GPU and jax 0.11; this is a {current_device()}, jax {jax.__version__}",
)
DECODE_BACKENDS = ("triton", pytest.param("mosaic_gpu", marks=needs_hopper))


def with_each_backend(*triton: tuple, mosaic_gpu: list[tuple]) -> list:
    """Parameters that begin with a backend's name, each with values that it supports."""
    wide = [pytest.param("mosaic_gpu", *values, marks=needs_hopper) for values in mosaic_gpu]
    return [*(("triton", *values) for values in triton), *wide]
