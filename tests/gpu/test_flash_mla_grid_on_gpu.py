"""FlashMLA's own grid, at its own tolerances: bfloat16, pages of 64, causal."""

import functools

import jax
import numpy as np
import pytest
from flash_mla_tolerance import SM_SCALE, assert_flash_mla, draw, reference
from on_gpu import DECODE_BACKENDS, needs_gpu

from pallas_kernels.paged_decode import paged_decode

pytestmark = [needs_gpu, pytest.mark.parametrize("backend", DECODE_BACKENDS)]

KEYS = (20, 140, 4096)
MOST_KEYS = 6144


@functools.partial(jax.jit, static_argnames="backend")
def decode(*args, backend: str):
    return paged_decode(*args, sm_scale=SM_SCALE, backend=backend)


def check(backend: str, seed: int, lengths: np.ndarray, tokens: int, heads: int) -> None:
    case, keys = draw(seed, lengths, tokens=tokens, heads=heads, most_keys=MOST_KEYS)
    out, lse = decode(*case.args, backend=backend)
    assert_flash_mla(out, lse, reference(case, keys))


@pytest.mark.parametrize("heads", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 6, 64])
def test_grid(seed, rng, batch, tokens, heads, backend):
    """Every number of keys with the same program; then lengths that vary around each."""
    for number in KEYS:
        check(backend, seed, np.full(batch, number), tokens, heads)
        varied = rng.normal(number, number / 2, batch).astype(int)
        check(backend, seed, np.clip(varied, tokens, MOST_KEYS), tokens, heads)


@pytest.mark.parametrize("heads", [16, 128])
def test_half_of_the_batch_is_empty(seed, rng, heads, backend):
    for number in KEYS:
        lengths = np.where(rng.permutation(128) < 64, 0, number)
        check(backend, seed, lengths, 2, heads)
