"""The real library's form of the decode call: one pool for all requests, natural-log lse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import BOUNDS, FP8, LSE, drawn, out_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GARBAGE, assert_within, float64, softmax_sum

from mla_jax.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from mla_jax.reference import ref_flash_mla_pool

BLOCK = 64
TRITON = {"backend": "triton", "interpret": True}


def make_pool(rng, lengths, *, tokens, heads=(4, 1), width=48, dtype="float32"):
    """(q, pool, table, lengths), NaN wherever no token lies, garbage behind the used ids."""
    columns, number = 4, 4 * len(lengths) + 2
    pool = np.full((number, BLOCK, heads[1], width), np.nan)
    table = rng.choice(GARBAGE, (len(lengths), columns))
    free = rng.permutation(number).tolist()
    for b, length in enumerate(lengths):
        for j in range(-(-length // BLOCK)):
            table[b, j] = free.pop()
            count = min(length - j * BLOCK, BLOCK)
            pool[table[b, j], :count] = rng.standard_normal((count, heads[1], width))
    q = drawn(rng, (len(lengths), tokens, heads[0], width), dtype)
    pool = jnp.asarray(pool, jnp.float32).astype(dtype)
    return q, pool, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


def attention(q, pool, table, lengths, *, scale, causal, head_dim_v, sink=None):
    """(out, natural-log lse) in float64, a query at a time."""
    batch, tokens, heads, _ = q.shape
    out = np.zeros((batch, tokens, heads, head_dim_v))
    lse = np.full((batch, heads, tokens), -np.inf)
    group = heads // pool.shape[2]
    for b, i, h in np.ndindex(batch, tokens, heads):
        seen = int(lengths[b]) - (tokens - 1 - i if causal else 0)
        if seen <= 0:
            continue
        t = np.arange(seen)
        keys = float64(pool)[np.asarray(table)[b, t // BLOCK], t % BLOCK, h // group]
        scores = keys @ float64(q)[b, i, h] * scale
        row, in_two = softmax_sum(scores, keys[:, :head_dim_v])
        lse[b, h, i] = in_two * np.log(2)
        share = 1.0
        if sink is not None:
            with np.errstate(over="ignore"):
                share = 1 / (1 + np.exp(float(sink[h]) - lse[b, h, i]))
        out[b, i, h] = row * share
    return out, lse


def check(args, *, dtype="float32", head_dim_v=32, **options):
    sink = options.get("attn_sink")
    q, pool, table, lengths = args
    out, lse = flash_mla_with_kvcache(
        q, pool, block_table=table, seq_lens=lengths, head_dim_v=head_dim_v, **options
    )
    want_out, want_lse = attention(
        *args,
        scale=options.get("softmax_scale", q.shape[-1] ** -0.5),
        causal=options.get("causal", False),
        head_dim_v=head_dim_v,
        sink=sink,
    )
    assert out.dtype == out_dtype(dtype)
    assert lse.dtype == jnp.float32
    assert_within(out, want_out, BOUNDS[dtype])
    assert_within(lse, want_lse, LSE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 11])
@pytest.mark.parametrize("options", [{}, TRITON])
def test_tokens(rng, options, tokens, causal):
    """More tokens than a decode kernel takes go to prefill; rows that see nothing are empty."""
    check(make_pool(rng, (0, 1, 64, 130), tokens=tokens), causal=causal, **options)


def test_triton_splits_the_widths(rng):
    """Latents and rotated columns of power-of-two widths, as the kernel needs them."""
    check(make_pool(rng, (130, 5), tokens=2), causal=True, head_dim_v=32, **TRITON)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", FP8])
def test_dtypes(rng, dtype):
    args = make_pool(rng, (65, 0, 192), tokens=2, width=576, heads=(3, 1), dtype=dtype)
    check(args, dtype=dtype, head_dim_v=512, causal=True, softmax_scale=0.1)


def test_key_heads(rng):
    for options in ({}, TRITON):
        check(make_pool(rng, (65, 130), tokens=3, heads=(6, 3)), causal=True, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_sink(rng, causal):
    """-inf has no effect, +inf leaves nothing, and lse knows of neither."""
    args = make_pool(rng, (0, 1, 130), tokens=2)
    sink = jnp.asarray([-np.inf, np.inf, 0.7, -2.0], jnp.float32)
    check(args, causal=causal, attn_sink=sink)


def test_empty_rows(rng):
    q, pool, table, _ = make_pool(rng, (64, 64), tokens=2)
    sink = jnp.asarray([-np.inf, np.inf, 0.0, 1.0], jnp.float32)
    out, lse = flash_mla_with_kvcache(
        *(q, pool),
        block_table=table,
        seq_lens=jnp.zeros(2, jnp.int32),
        head_dim_v=32,
        attn_sink=sink,
    )
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_any_case(data, seed):
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(0, 256), min_size=1, max_size=3))
    kv_heads, ratio = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 10))
    args = make_pool(rng, lengths, tokens=tokens, heads=(kv_heads * ratio, kv_heads))
    check(args, causal=data.draw(st.booleans()), head_dim_v=data.draw(st.sampled_from([32, 48])))


def test_oracle_agrees(rng):
    """The jnp oracle, which nothing else of this file uses, says the same."""
    for sink in (None, jnp.asarray([-np.inf, np.inf, 0.7, -2.0], jnp.float32)):
        args = make_pool(rng, (0, 1, 130), tokens=3)
        out, lse = ref_flash_mla_pool(*args, head_dim_v=32, causal=True, attn_sink=sink)
        want = attention(*args, scale=48**-0.5, causal=True, head_dim_v=32, sink=sink)
        assert_within(out, want[0], BOUNDS["float32"])
        assert_within(lse, want[1], LSE["float32"])


def test_jit_and_metadata(rng):
    q, pool, table, lengths = make_pool(rng, (65, 130), tokens=1)
    metadata = get_mla_metadata(q.shape, pool.shape, table, lengths)

    @jax.jit
    def call(table, lengths):
        return flash_mla_with_kvcache(
            *(q, pool), block_table=table, seq_lens=lengths, metadata=metadata, head_dim_v=32
        )

    want = attention(q, pool, table, lengths, scale=48**-0.5, causal=False, head_dim_v=32)
    out, lse = call(table, lengths)
    assert_within(out, want[0], BOUNDS["float32"])
    assert_within(lse, want[1], LSE["float32"])


def test_errors(rng):
    q, pool, table, lengths = make_pool(rng, (65, 130), tokens=2)

    def refuses(error, match, q=q, pool=pool, v_cache=None, **options):
        requests = {"block_table": table, "seq_lens": lengths}
        with pytest.raises(error, match=match):
            flash_mla_with_kvcache(q, pool, v_cache, **{**requests, **options})

    refuses(ValueError, "head_dim_v: got 512, expected 1 to 48")
    refuses(ValueError, "head_dim_v: got 0", head_dim_v=0)
    refuses(ValueError, r"k_cache: got blocks of 32 in shape .* expected 64", pool=pool[:, :32])
    refuses(ValueError, "k_cache: got shape .* beside q's shape", pool=pool[..., :40])
    refuses(ValueError, "v_cache: got None beside", pool=pool[None])
    refuses(ValueError, "v_cache: got shape .* beside", v_cache=pool)
    refuses(ValueError, "attn_sink: got float32", attn_sink=jnp.zeros(3), head_dim_v=32)
    refuses(ValueError, "mask: got an array, expected None", mask=jnp.ones((2, 1, 1, 200), bool))
    refuses(ValueError, "block_table: got shape .* beside", block_table=table[:1])
    refuses(ValueError, "block_table: got None", block_table=None)
    refuses(ValueError, "seq_lens: got None", seq_lens=None)
    refuses(ValueError, "block_table: got block id 10 at", block_table=table.at[1, 2].set(10))
    refuses(
        ValueError, r"seq_lens: got 65 to 257, expected 0 to 256", seq_lens=lengths.at[1].set(257)
    )
    refuses(ValueError, "q: got 4 heads", pool=jnp.repeat(pool, 3, axis=2))
