"""FlashMLA's functions against float64 oracles, on the reference and on interpreted kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import (
    BLOCK,
    BOUNDS,
    FP8,
    GroupedCase,
    decode_attention,
    drawn,
    make_grouped,
    out_dtype,
    prefill_attention,
    some_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_within, float64

import mla_jax
from mla_jax.bench.timing import compilations
from mla_jax.flash_mla import (
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mha_fwd_kvcache,
)

BACKENDS: list[dict] = [{}, {"backend": "triton", "interpret": True}]
DTYPES = ["float32", "bfloat16", "float16", FP8]


def decode_args(case: GroupedCase) -> dict[str, Any]:
    names = {"seq_lens": "length"} | {n: n for n in ("q", "k_cache", "v_cache", "block_table")}
    return {name: getattr(case, field) for name, field in names.items()}


def in_order(case: GroupedCase, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's keys and values [B, Hk, tokens, D], as float64."""
    batch, group = case.q.shape[0], case.q.shape[1] // case.k_cache.shape[1]
    heads = range(0, case.q.shape[1], group)
    both = [[case.keys(b, h, tokens) for h in heads] for b in range(batch)]
    k, v = (np.asarray([[pair[i] for pair in row] for row in both]) for i in range(2))
    return k, v


def test_exported():
    assert mla_jax.flash_mla.flash_mla_prefill is flash_mla_prefill


@pytest.mark.parametrize("options", BACKENDS)
@pytest.mark.parametrize("kind", [None, "bool", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(rng, dtype, kind, options):
    case = make_grouped(rng, (0, 1, 64, 130), dtype=dtype)
    mask = some_mask(rng, kind, (4, int(rng.choice([1, 4])), 1, 150))
    out = flash_mla_with_kvcache(**decode_args(case), mask=mask, **options)
    want, _ = decode_attention(case, None if mask is None else mask[:, :, 0], 16**-0.5)
    assert out.dtype == out_dtype(dtype)
    assert_within(out, want[:, :, None], BOUNDS[dtype])


def test_decode_with_metadata_under_jit(rng):
    """The record is hashable, so static; tables and lengths are traced: one compile."""
    call = jax.jit(flash_mla_with_kvcache, static_argnames="metadata")
    for lengths in [(5, 130), (192, 0), (64, 65)]:
        case = make_grouped(rng, lengths)
        metadata = get_mla_metadata(case.q.shape, case.k_cache.shape, case.block_table, case.length)
        out = call(**decode_args(case), metadata=metadata, softmax_scale=0.5)
        assert_within(out, decode_attention(case, None, 0.5)[0][:, :, None], BOUNDS["float32"])
    assert compilations(call) == 1


def test_metadata_under_jit(rng):
    """Values that are traced are not looked at; shapes are."""
    case = make_grouped(rng, (5, 130))

    @jax.jit
    def call(table, lengths):
        metadata = get_mla_metadata(case.q.shape, case.k_cache.shape, table, lengths)
        return flash_mla_with_kvcache(
            case.q, case.k_cache, case.v_cache, table, lengths, metadata=metadata
        )

    out = call(case.block_table, case.length)
    assert_within(out, decode_attention(case, None, 0.25)[0][:, :, None], BOUNDS["float32"])
    call(case.block_table, case.length + 1000)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_any_decode(data, seed):
    rng = np.random.default_rng(seed)
    blocks = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, blocks * BLOCK), min_size=1, max_size=3))
    kv_heads, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    case = make_grouped(rng, tuple(lengths), heads=(kv_heads * ratio, kv_heads), blocks=blocks)
    out = flash_mla_with_kvcache(**decode_args(case))
    assert_within(out, decode_attention(case, None, 0.25)[0][:, :, None], BOUNDS["float32"])


@pytest.mark.parametrize("options", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(rng, dtype, options):
    """Causal without a mask; a mask takes its place; a layout is besides."""
    tokens = 100
    q, k, v = (drawn(rng, (2, heads, tokens, 16), dtype) for heads in (4, 2, 2))
    for kind in (None, "bool", "float32"):
        mask = some_mask(rng, kind, (2, 1, tokens, tokens))
        for shape in (None, (2, 2), (2, 2, 2), (2, 1, 2, 2), (2, 4, 2, 2)):
            layout = None if shape is None else jnp.asarray(rng.random(shape) < 0.6)
            out = flash_mla_prefill(q, k, v, layout, mask, **options)
            want, _ = prefill_attention(
                *(q, float64(k), float64(v), 0.25),
                layout=layout,
                mask=mask,
                causal=mask is None,
            )
            assert out.dtype == out_dtype(dtype)
            assert_within(out, want, BOUNDS[dtype])


@pytest.mark.parametrize("options", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_mha(rng, heads, options):
    tokens = int(rng.integers(65, 129))
    case = make_grouped(rng, (tokens, tokens), queries=tokens, heads=heads)
    k, v = in_order(case, tokens)
    for kind in (None, "bool", "float32"):
        mask = some_mask(rng, kind, (2, 1, tokens, tokens))
        args = case.q, case.k_cache, case.v_cache, case.block_table, mask
        out = mha_fwd_kvcache(*args, softmax_scale=0.2, **options)
        want, _ = prefill_attention(case.q, k, v, 0.2, mask=mask, causal=mask is None)
        assert_within(out, want, BOUNDS["float32"])


@pytest.mark.parametrize("options", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mha_writes(rng, dtype, options):
    """New tokens land where the table says; every other slot keeps its bits."""
    tokens = int(rng.integers(65, 128))
    case = make_grouped(rng, (192, 192), blocks=4, queries=tokens, dtype=dtype)
    new = [drawn(rng, (2, 2, tokens, 16), dtype) for _ in range(2)]
    caches = case.k_cache, case.v_cache
    call = jax.jit(functools.partial(mha_fwd_kvcache, **options))
    out, *written = call(case.q, *caches, case.block_table, k_new=new[0], v_new=new[1])
    want, _ = prefill_attention(case.q, float64(new[0]), float64(new[1]), 0.25)
    assert_within(out, want, BOUNDS[dtype])
    for before, array, after in zip(caches, new, written, strict=True):
        expected = float64(before)
        for b, t in np.ndindex(2, tokens):
            block = int(case.block_table[b, t // BLOCK])
            expected[b, :, block, t % BLOCK] = float64(array)[b, :, t]
        np.testing.assert_array_equal(float64(after), expected)


def test_traced_garbage_ids_write_nothing(rng):
    case = make_grouped(rng, (128,), blocks=2, queries=128, heads=(2, 2))
    new = drawn(rng, (1, 2, 128, 16), "float32")
    call = jax.jit(mha_fwd_kvcache)
    for bad in (-1, 2, 10**6):
        table = jnp.asarray([[1, bad]], jnp.int32)
        caches = case.k_cache, case.v_cache
        _, k_cache, _ = call(case.q, *caches, table, k_new=new, v_new=new)
        np.testing.assert_array_equal(k_cache[:, :, 0], case.k_cache[:, :, 0])
        np.testing.assert_array_equal(k_cache[:, :, 1], new[:, :, :BLOCK])


def test_prefill_then_decode(rng):
    """What prefill writes, decode reads."""
    tokens, width = 100, 16
    q, k, v = (drawn(rng, (1, heads, tokens, width), "float32") for heads in (4, 2, 2))
    cache = jnp.full((1, 2, 3, BLOCK, width), jnp.nan)
    table = jnp.asarray([rng.permutation(3)], jnp.int32)
    out, k_cache, v_cache = mha_fwd_kvcache(q, cache, cache, table, k_new=k, v_new=v)
    last = flash_mla_with_kvcache(q[:, :, -1:], k_cache, v_cache, table, jnp.array([tokens]))
    np.testing.assert_allclose(last, out[:, :, -1:], atol=1e-5)
    np.testing.assert_allclose(out, flash_mla_prefill(q, k, v), atol=1e-5)
