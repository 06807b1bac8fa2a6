"""The jnp oracles of FlashMLA's functions against float64 loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from grouped import (
    BOUNDS,
    decode_attention,
    drawn,
    make_grouped,
    prefill_attention,
    some_mask,
)
from oracles import assert_within, float64

from mla_jax.reference import (
    ref_flash_mla_prefill,
    ref_flash_mla_with_kvcache,
    ref_mha_fwd_kvcache,
)

KINDS = [None, "bool", "float32", "bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
def test_decode(rng, kind):
    """Masks that end before the cache does, and the empty request."""
    case = make_grouped(rng, (0, 1, 64, 130))
    mask = some_mask(rng, kind, (4, int(rng.choice([1, 4])), 1, int(rng.integers(130, 200))))
    out = ref_flash_mla_with_kvcache(
        case.q, case.k_cache, case.v_cache, case.block_table, case.length, mask, softmax_scale=0.3
    )
    want, _ = decode_attention(case, None if mask is None else mask[:, :, 0], 0.3)
    assert_within(out, want[:, :, None], BOUNDS["float32"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [None, (2, 2), (2, 2, 2), (2, 1, 2, 2), (2, 4, 2, 2)])
def test_prefill(rng, shape, kind):
    tokens = 100
    q, k, v = (drawn(rng, (2, heads, tokens, 16), "float32") for heads in (4, 2, 2))
    mask = some_mask(rng, kind, (2, int(rng.choice([1, 4])), tokens, tokens))
    layout = None if shape is None else jnp.asarray(rng.random(shape) < 0.6)
    out = ref_flash_mla_prefill(q, k, v, layout, mask)
    want, _ = prefill_attention(
        *(q, float64(k), float64(v), 0.25), layout=layout, mask=mask, causal=mask is None
    )
    assert_within(out, want, BOUNDS["float32"])


def test_mha(rng):
    """Blocks in any order, NaN behind the tokens, garbage behind the used ids."""
    tokens = int(rng.integers(65, 128))
    case = make_grouped(rng, (tokens, tokens), queries=tokens)
    out = ref_mha_fwd_kvcache(case.q, case.k_cache, case.v_cache, case.block_table)
    both = [[case.keys(b, head, tokens) for head in (0, 2)] for b in range(2)]
    k, v = (np.asarray([[pair[i] for pair in row] for row in both]) for i in range(2))
    want, _ = prefill_attention(case.q, k, v, 0.25)
    assert_within(out, want, BOUNDS["float32"])
