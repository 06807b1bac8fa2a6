"""FlashMLA's own grid, at its own tolerances: bfloat16, pages of 64, causal."""

import jax
import numpy as np
import pytest
from flash_mla_tolerance import SM_SCALE, assert_flash_mla, draw, reference

from pallas_kernels.paged_decode import paged_decode

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU; this run has none"
)

KEYS = (20, 140, 4096)
MOST_KEYS = 6144


@jax.jit
def decode(*args):
    return paged_decode(*args, sm_scale=SM_SCALE, backend="triton")


def check(seed: int, lengths: np.ndarray, tokens: int, heads: int) -> None:
    case, keys = draw(seed, lengths, tokens=tokens, heads=heads, most_keys=MOST_KEYS)
    out, lse = decode(*case.args)
    assert_flash_mla(out, lse, reference(case, keys))


@pytest.mark.parametrize("heads", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 6, 64])
def test_grid(seed, rng, batch, tokens, heads):
    """Every number of keys with the same program; then lengths that vary around each."""
    for number in KEYS:
        check(seed, np.full(batch, number), tokens, heads)
        varied = rng.normal(number, number / 2, batch).astype(int)
        check(seed, np.clip(varied, tokens, MOST_KEYS), tokens, heads)


@pytest.mark.parametrize("heads", [16, 128])
def test_half_of_the_batch_is_empty(seed, rng, heads):
    for number in KEYS:
        lengths = np.where(rng.permutation(128) < 64, 0, number)
        check(seed, lengths, 2, heads)
