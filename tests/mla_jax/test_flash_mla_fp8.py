"""FP8 in the real library's form of the decode call: one scale each, and rows of 656 bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import BOUNDS, FP8, LSE
from oracles import assert_within, float64
from test_flash_mla_pool import TRITON, attention, make_pool
from test_quantization import decode_e4m3

from mla_jax import QuantizedLatents, quantize_cache
from mla_jax.flash_mla import flash_mla_with_kvcache

LENGTHS = (0, 1, 64, 130)


def compare(results, args, dtype, **options):
    want = attention(*args, causal=True, **options)
    for got, expected, bounds in zip(results, want, (BOUNDS[dtype], LSE[dtype]), strict=True):
        assert_within(got, expected, bounds)


@pytest.mark.parametrize("options", [{}, TRITON])
def test_a_number_for_q_and_one_for_k(rng, options):
    q, pool, table, lengths = make_pool(rng, LENGTHS, tokens=2, heads=(4, 1), width=48, dtype=FP8)
    descale = rng.uniform(0.5, 1.0, 2).astype(np.float32)
    results = jax.jit(
        lambda a, b: flash_mla_with_kvcache(
            *(q, pool),
            block_table=table,
            seq_lens=lengths,
            head_dim_v=32,
            causal=True,
            descale_q=a,
            descale_k=b,
            **options,
        )
    )(*jnp.asarray(descale)[:, None])
    exact = float64(q) * float(descale[0]), float64(pool) * float(descale[1])
    assert results[0].dtype == jnp.bfloat16
    compare(results, (*exact, table, lengths), FP8, scale=48**-0.5, head_dim_v=32)


def exact_rows(rows: np.ndarray, latent: int) -> np.ndarray:
    """The numbers that rows of bytes stand for, field by field."""
    ends = latent, latent + 4 * -(-latent // 128)
    ckv, scales, kpe = (np.ascontiguousarray(part) for part in np.split(rows, ends, axis=-1))
    scales = np.repeat(scales.view("<f4").astype(np.float64), 128, axis=-1)[..., :latent]
    return np.concatenate([decode_e4m3(ckv) * scales, float64(kpe.view(jnp.bfloat16))], axis=-1)


@pytest.mark.parametrize(
    ("dtype", "heads", "width", "latent", "options"),
    [
        ("float32", (4, 1), 48, 32, TRITON),
        ("float32", (4, 2), 160, 128, TRITON),
        ("bfloat16", (3, 1), 576, 512, {}),
        ("bfloat16", (16, 1), 576, 512, TRITON),
    ],
)
@pytest.mark.parametrize("view", [jnp.uint8, jnp.float8_e4m3fn])
def test_rows_of_bytes(rng, dtype, heads, width, latent, options, view):
    args = make_pool(rng, LENGTHS, tokens=2, heads=heads, width=width, dtype=dtype)
    q, pool, table, lengths = args
    cache = quantize_cache(pool[..., :latent], pool[..., latent:])
    rows = np.asarray(cache.packed())
    assert rows.shape[-1] == (656 if width == 576 else latent + 4 + 2 * (width - latent))
    results = flash_mla_with_kvcache(
        *(q, jnp.asarray(rows.view(view))),
        block_table=table,
        seq_lens=lengths,
        head_dim_v=latent,
        causal=True,
        is_fp8_kvcache=True,
        **options,
    )
    assert results[0].dtype == dtype
    exact = exact_rows(rows, latent)
    compare(results, (q, exact, table, lengths), dtype, scale=width**-0.5, head_dim_v=latent)


def test_errors(rng):
    q, pool, table, lengths = make_pool(rng, (65, 130), tokens=2, heads=(4, 1), width=48)
    rows = quantize_cache(pool[..., :32], pool[..., 32:]).packed()

    def refuses(error, match, q=q, pool=rows, v_cache=None, **options):
        defaults = {"block_table": table, "seq_lens": lengths, "head_dim_v": 32}
        with pytest.raises(error, match=match):
            flash_mla_with_kvcache(q, pool, v_cache, **{**defaults, **options})

    packed: dict[str, Any] = {"is_fp8_kvcache": True}
    refuses(
        ValueError, "k_cache: got shape .* expected rows of 68 bytes", pool=rows[..., 1:], **packed
    )
    refuses(ValueError, "v_cache: got None beside", pool=rows[0], **packed)
    refuses(TypeError, "k_cache: got dtype int16", pool=rows.astype(jnp.int16), **packed)
    refuses(TypeError, "q: got dtype float8_e4m3fn", q=q.astype(FP8), **packed)
    refuses(ValueError, "descale_k: got a value, expected None", descale_k=1.0, **packed)
    refuses(ValueError, "descale_q: got a value, expected None", pool=pool, descale_q=1.0)
    eight = {"q": q.astype(FP8), "pool": pool.astype(FP8)}
    refuses(ValueError, r"descale_q: got shape \(2,\)", descale_q=jnp.ones(2), **eight)
    with pytest.raises(ValueError, match="rows: got"):
        QuantizedLatents.unpack(rows, latent=100)
