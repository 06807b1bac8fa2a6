"""FlashMLA's functions on the chip, at real widths, beside float64 oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import (
    BOUNDS,
    FP8,
    LSE,
    decode_attention,
    drawn,
    make_grouped,
    out_dtype,
    prefill_attention,
    some_mask,
)
from on_gpu import needs_gpu
from oracles import assert_within, float64

from mla_jax.flash_mla import flash_mla_prefill, flash_mla_with_kvcache, mha_fwd_kvcache
from mla_jax.reference import ref_flash_mla_pool, ref_flash_mla_prefill
from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.sparse_prefill import sparse_prefill

pytestmark = needs_gpu
DTYPES = ["float32", "bfloat16", "float16", FP8]
WIDTHS = [64, 128, 192, 256]


@pytest.mark.parametrize("kind", [None, "bool", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_decode(rng, width, dtype, kind):
    lengths = (0, 1, 63, 64, 65, 700, 640)
    for heads in ((8, 2), (3, 3), (40, 1)):
        case = make_grouped(rng, lengths, heads=heads, width=width, blocks=11, dtype=dtype)
        mask = some_mask(rng, kind, (len(lengths), int(rng.choice([1, heads[0]])), 704))
        call = functools.partial(grouped_decode, sm_scale=width**-0.5, backend="triton")
        out, lse = jax.jit(call)(*case.args, mask)
        want_out, want_lse = decode_attention(case, mask, width**-0.5)
        assert out.dtype == out_dtype(dtype)
        assert_within(out, want_out, BOUNDS[dtype])
        assert_within(lse, want_lse, LSE[dtype])


@pytest.mark.parametrize("num_splits", [None, 1, 3, 16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_decode_splits(rng, num_splits, deterministic):
    case = make_grouped(rng, (9000, 1, 130), heads=(8, 4), width=128, blocks=150, dtype="bfloat16")
    call = jax.jit(
        functools.partial(
            grouped_decode,
            sm_scale=0.1,
            backend="triton",
            num_splits=num_splits,
            deterministic=deterministic,
        )
    )
    out, lse = call(*case.args)
    want_out, want_lse = decode_attention(case, None, 0.1)
    assert_within(out, want_out, BOUNDS["bfloat16"])
    assert_within(lse, want_lse, LSE["bfloat16"])
    for _ in range(10):
        again = call(*case.args)
        np.testing.assert_array_equal(again[0], out)
        np.testing.assert_array_equal(again[1], lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_prefill(rng, width, dtype):
    """Against the dense jnp oracle in float32: tall tiles, layouts of all forms, masks."""
    tokens = 1000
    q, k, v = (drawn(rng, (2, heads, tokens, width), dtype) for heads in (4, 2, 2))
    for kind in (None, "bool", "float32"):
        mask = some_mask(rng, kind, (2, 1, tokens, tokens))
        for shape in (None, (16, 16), (2, 16, 16), (2, 4, 16, 16)):
            layout = None if shape is None else jnp.asarray(rng.random(shape) < 0.3)
            call = functools.partial(flash_mla_prefill, backend="triton")
            out = jax.jit(call)(q, k, v, layout, mask)
            want = jax.jit(ref_flash_mla_prefill)(q, k, v, layout, mask)
            assert out.dtype == out_dtype(dtype)
            assert_within(out, float64(want), BOUNDS[dtype])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_prefill_in_float64(rng, tokens, causal):
    q, k, v = (drawn(rng, (1, 2, tokens, 128), "bfloat16") for _ in range(3))
    call = functools.partial(sparse_prefill, sm_scale=0.1, causal=causal, backend="triton")
    out, lse = jax.jit(call)(q, k, v)
    want_out, want_lse = prefill_attention(q, float64(k), float64(v), 0.1, causal=causal)
    assert_within(out, want_out, BOUNDS["bfloat16"])
    assert_within(lse, want_lse, LSE["bfloat16"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_blocks_are_not_touched(rng, dtype):
    """NaN keys and values in blocks that no query meets change nothing."""
    blocks = 16
    q, k, v = (drawn(rng, (1, 2, 64 * blocks, 128), dtype) for _ in range(3))
    skipped = rng.random(blocks) < 0.5
    layout = jnp.asarray(~skipped) & jnp.asarray(rng.random((blocks, blocks)) < 0.5)
    bad = jnp.asarray(np.repeat(skipped, 64))[:, None]
    call = jax.jit(functools.partial(flash_mla_prefill, backend="triton"))
    want = call(q, k, v, layout)
    k, v = (jnp.where(bad, jnp.asarray(np.nan, x.dtype), x) for x in (k, v))
    np.testing.assert_array_equal(float64(call(q, k, v, layout)), float64(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mha_writes_then_decode_reads(rng, dtype):
    tokens, width = 777, 128
    q, k, v = (drawn(rng, (2, heads, tokens, width), dtype) for heads in (4, 2, 2))
    cache = jnp.full((2, 2, 16, 64, width), jnp.nan, jnp.float32).astype(dtype)
    table = jnp.asarray([rng.permutation(16) for _ in range(2)], jnp.int32)
    write = jax.jit(functools.partial(mha_fwd_kvcache, backend="triton"))
    out, k_cache, v_cache = write(q, cache, cache, table, k_new=k, v_new=v)
    want = jax.jit(functools.partial(flash_mla_prefill, backend="triton"))(q, k, v)
    np.testing.assert_array_equal(float64(out), float64(want))
    read = jax.jit(functools.partial(flash_mla_with_kvcache, backend="triton"))
    last = read(q[:, :, -1:], k_cache, v_cache, table, jnp.full(2, tokens, jnp.int32))
    assert_within(last, float64(want[:, :, -1:]), BOUNDS[dtype])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 8, 20])
@pytest.mark.parametrize("heads", [16, 128])
def test_pool(rng, heads, tokens, causal):
    """The real library's form, whatever backend a call gets."""
    q = drawn(rng, (3, tokens, heads, 576), "bfloat16")
    pool = drawn(rng, (40, 64, 1, 576), "bfloat16")
    table = jnp.asarray(rng.permutation(40)[:36].reshape(3, 12), jnp.int32)
    lengths = jnp.asarray([0, 65, 768], jnp.int32)
    sink = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    options = {"causal": causal, "attn_sink": sink}
    call = functools.partial(flash_mla_with_kvcache, causal=causal)
    out, lse = jax.jit(call)(q, pool, block_table=table, seq_lens=lengths, attn_sink=sink)
    want_out, want_lse = ref_flash_mla_pool(q, pool, table, lengths, **options)
    assert_within(out, float64(want_out), BOUNDS["bfloat16"])
    assert_within(lse, float64(want_lse), LSE["bfloat16"])
