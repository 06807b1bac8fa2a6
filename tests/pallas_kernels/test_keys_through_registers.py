"""Keys that come to the Mosaic GPU kernel through registers: e4m3, any page size, and lists."""

import jax
import pytest
from fp8_pages import as_operands, make_fp8
from interpreted import needs_mosaic_gpu, no_races
from oracles import assert_within
from paged_decode_suite import LSE, OUT
from token_lists import attend_lists, in_fp8, make_lists

from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.token_sparse import token_sparse

pytestmark = needs_mosaic_gpu

SM_SCALE = 0.05
MOSAIC = {"backend": "mosaic_gpu", "interpret": True}


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes"),
    [
        ("slot", "bfloat16", {"heads": 3, "tokens": 2, "page_size": 4, "latent": 256}),
        ("tensor_kpe", "float16", {"heads": 40, "page_size": 5, "latent": 128}),
    ],
)
def test_paged(rng, kind, dtype, sizes):
    """Both orders of the consumers: empty, one token, a tile's edge, split and not."""
    fp8 = make_fp8(rng, kind, lengths=(0, 1, 150), rope=64, dtype=dtype, **sizes)

    def run(scales, *args):
        return paged_decode(*args, sm_scale=SM_SCALE, kv_scales=scales, num_splits=2, **MOSAIC)

    with no_races():
        out, lse = jax.jit(run)(fp8.kv_scales, *fp8.case.args)
    want_out, want_lse = fp8.want(SM_SCALE, rounded=True)
    assert_within(out, want_out, OUT[dtype])
    assert_within(lse, want_lse, LSE)


@pytest.mark.parametrize(
    ("kind", "heads", "gaps"),
    [(None, 3, True), ("slot", 40, True)],
)
def test_lists(rng, kind, heads, gaps):
    """Of bfloat16 and of e4m3 tokens, with ids between them that stand for none."""
    case = make_lists(
        rng, (0, 1, 128), heads=heads, gaps=gaps, latent=128, rope=64, dtype="bfloat16"
    )
    scales, exact = None, case
    if kind is not None:
        case, scales, exact = in_fp8(case, kind)

    def run(scales, *args):
        return token_sparse(*args, sm_scale=SM_SCALE, kv_scales=scales, **MOSAIC)

    with no_races():
        out, lse = jax.jit(run)(scales, *case.args)
    want_out, want_lse = attend_lists(as_operands(exact), SM_SCALE)
    assert_within(out, want_out, OUT["bfloat16"])
    assert_within(lse, want_lse, LSE)
