"""Sparse prefill against a float64 oracle: the reference, and the Triton kernel interpreted."""

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
    LSE,
    drawn,
    make_grouped,
    out_dtype,
    prefill_attention,
    some_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within, float64

from pallas_kernels.causal_prefill.tiles import CausalTiles
from pallas_kernels.sparse_prefill import sparse_prefill
from pallas_kernels.sparse_prefill.tiles import plan_visits
from pallas_kernels.sparse_prefill.triton import sparse_prefill_triton

SCALE = 0.3
BACKENDS = ("reference", "triton")
FORMS = ("none", "square", "batch", "shared", "heads")


def make_layout(rng, form: str, batch: int, heads: int, blocks: int, density=0.5):
    square = (blocks, blocks)
    leading = {"square": (), "batch": (batch,), "shared": (batch, 1), "heads": (batch, heads)}
    if form == "none":
        return None
    return jnp.asarray(rng.random((*leading[form], *square)) < density)


def inputs(
    rng, tokens: int, *, heads=(4, 2), width=16, dtype="float32", batch=2
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (drawn(rng, (batch, n, tokens, width), dtype) for n in (*heads, heads[1]))
    return q, k, v


def run(q, k, v, backend: str, **options):
    static = {key: options.pop(key) for key in ("causal",) if key in options}
    call = functools.partial(
        sparse_prefill, sm_scale=SCALE, backend=backend, interpret=backend == "triton", **static
    )
    return jax.jit(call, compiler_options=QUICK_COMPILE)(q, k, v, **options)


def check(q, k, v, backend: str, **options) -> None:
    out, lse = run(q, k, v, backend, **options)
    want_out, want_lse = prefill_attention(q, float64(k), float64(v), SCALE, **options)
    dtype = str(q.dtype)
    assert out.dtype == out_dtype(dtype)
    assert_within(out, want_out, BOUNDS[dtype])
    assert_within(lse, want_lse, LSE[dtype])


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(rng, backend, causal, tokens):
    check(*inputs(rng, tokens), backend, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(rng, backend, form, causal):
    """In tiles of 64 rows and in smaller ones; the last block is a part of one."""
    for dtype in ("float32", "bfloat16"):
        layout = make_layout(rng, form, 2, 4, 3)
        check(*inputs(rng, 150, dtype=dtype), backend, layout=layout, causal=causal)


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize("form", ["none", "heads"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(rng, backend, causal, form, kind):
    tokens = 100
    shape = (2, int(rng.choice([1, 4])), tokens + int(rng.integers(0, 3)), tokens + 5)
    mask = some_mask(rng, kind, shape)
    layout = make_layout(rng, form, 2, 4, 2)
    check(*inputs(rng, tokens), backend, mask=mask, layout=layout, causal=causal)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", FP8])
@pytest.mark.parametrize(("heads", "width"), [((2, 2), 64), ((3, 1), 192), ((2, 1), 256)])
def test_heads_and_widths(rng, heads, width, dtype):
    for backend in BACKENDS:
        check(*inputs(rng, 70, heads=heads, width=width, dtype=dtype, batch=1), backend)


def test_tall_tiles(rng):
    """Two blocks of queries to a tile, which long prompts without a layout get."""
    check(*inputs(rng, 600, dtype="bfloat16", batch=1), "triton", causal=True)


@pytest.mark.parametrize("tokens", [64, 100, 192])
@pytest.mark.parametrize("backend", BACKENDS)
def test_paged(rng, backend, tokens):
    """Blocks in any order, NaN behind the tokens, garbage behind the used ids."""
    case = make_grouped(rng, (tokens, tokens), blocks=4, queries=tokens)
    both = [[case.keys(b, h, tokens) for h in (0, 2)] for b in range(2)]
    k, v = (np.asarray([[pair[i] for pair in heads] for heads in both]) for i in range(2))
    layout = make_layout(rng, "heads", 2, 4, -(-tokens // BLOCK))
    mask = some_mask(rng, "bool", (2, 1, 200, 200))
    cases: tuple[dict[str, Any], ...] = ({}, {"layout": layout}, {"mask": mask})
    for options in cases:
        paged = (case.k_cache, case.v_cache)
        out, lse = run(case.q, *paged, backend, block_table=case.block_table, **options)
        want_out, want_lse = prefill_attention(case.q, k, v, SCALE, **options)
        assert_within(out, want_out, BOUNDS["float32"])
        assert_within(lse, want_lse, LSE["float32"])


def test_skipped_blocks_are_not_touched(rng):
    """NaN keys and values in a block that no query meets leave the kernel's result as it is."""
    q, k, v = inputs(rng, 192)
    layout = jnp.asarray([[1, 0, 0], [1, 0, 0], [1, 0, 1]], jnp.bool_)
    k, v = (x.at[:, :, BLOCK : 2 * BLOCK].set(jnp.nan) for x in (k, v))
    for causal in (True, False):
        out, lse = run(q, k, v, "triton", layout=layout, causal=causal)
        want = prefill_attention(*(q, float64(k), float64(v), SCALE), layout=layout, causal=causal)
        assert_within(out, want[0], BOUNDS["float32"])
        assert_within(lse, want[1], LSE["float32"])


def test_visits(rng):
    """Rising lists of exactly the blocks that the layout has, those above the diagonal left out."""
    layout = np.asarray(rng.random((3, 7, 7)) < 0.4)
    for causal in (True, False):
        visits = plan_visits(jnp.asarray(layout), causal)
        for index in np.ndindex(3, 7):
            want = [j for j in np.flatnonzero(layout[index]) if j <= index[1] or not causal]
            count = int(visits.count[index])
            assert visits.block[index][:count].tolist() == want


def test_nothing_is_seen(rng):
    q, k, v = inputs(rng, 130)
    hidden = jnp.zeros((2, 1, 130, 130), jnp.bool_)
    nothing: list[dict] = [
        {"layout": jnp.zeros((3, 3), jnp.bool_)},
        {"mask": hidden},
        {"mask": jnp.where(hidden, 0.0, -jnp.inf)},
        {"layout": ~jnp.tri(3, dtype=jnp.bool_)},
    ]
    for options in nothing:
        for backend in BACKENDS:
            out, lse = run(q, k, v, backend, **options)
            np.testing.assert_array_equal(out, 0.0)
            np.testing.assert_array_equal(lse, -np.inf)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_any_case(data, seed):
    rng = np.random.default_rng(seed)
    tokens = data.draw(st.integers(1, 140))
    kv_heads, ratio = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    heads = (kv_heads * ratio, kv_heads)
    batch = data.draw(st.integers(1, 2))
    layout = make_layout(
        rng, data.draw(st.sampled_from(FORMS)), batch, heads[0], -(-tokens // BLOCK)
    )
    kind = data.draw(st.sampled_from([None, "bool", "float32"]))
    mask = some_mask(rng, kind, (batch, 1, tokens, tokens))
    causal = data.draw(st.booleans())
    for backend in BACKENDS:
        check(
            *inputs(rng, tokens, heads=heads, batch=batch),
            backend,
            layout=layout,
            mask=mask,
            causal=causal,
        )


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 64), (64, 32), (128, 64)])
def test_tiles(rng, rows, keys):
    q, k, v = inputs(rng, 150)
    layout = None if rows > BLOCK else make_layout(rng, "batch", 2, 4, 3)
    out, _ = sparse_prefill_triton(
        *(q, k, v, None if layout is None else layout[:, None], None, None, jnp.float32(SCALE)),
        causal=True,
        interpret=True,
        tiles=CausalTiles(rows=rows, keys=keys, num_warps=4, num_stages=2),
    )
    want = prefill_attention(q, float64(k), float64(v), SCALE, layout=layout)[0]
    assert_within(out, want, BOUNDS["float32"])


def test_errors(rng):
    q, k, v = inputs(rng, 130)

    def refuses(error, match, *args, **options):
        with pytest.raises(error, match=match):
            sparse_prefill(*args, sm_scale=1.0, **options)

    refuses(ValueError, "q: got shape", q[0], k, v)
    refuses(ValueError, "v: got shape", q, k, v[:, :, :64])
    refuses(ValueError, "k: got shape .* a divisor of 3", q[:, :3], k, v)
    refuses(TypeError, "v: got dtype", q, k, v.astype(jnp.bfloat16))
    refuses(TypeError, "q: got dtype int32", *(x.astype(jnp.int32) for x in (q, k, v)))
    layout = jnp.ones((3, 3), jnp.bool_)
    refuses(ValueError, "layout: got shape", q, k, v, layout=layout[:2, :2])
    refuses(ValueError, "layout: got shape", q, k, v, layout=jnp.ones((2, 3, 3, 3), jnp.bool_))
    refuses(TypeError, "layout: got dtype int32", q, k, v, layout=layout.astype(jnp.int32))
    mask = jnp.ones((2, 1, 130, 130), jnp.bool_)
    refuses(ValueError, "mask: got shape", q, k, v, mask=mask[..., :129])
    refuses(TypeError, "mask: got dtype int32", q, k, v, mask=mask.astype(jnp.int32))
    case = make_grouped(rng, (130, 130))
    caches, table = (case.k_cache, case.v_cache), case.block_table
    refuses(ValueError, "block_table: got shape", q, *caches, block_table=table[:1])
    refuses(TypeError, "block_table: got dtype", q, *caches, block_table=table.astype(jnp.float32))
    refuses(ValueError, "k: got shape", q, k, v, block_table=table)
    refuses(NotImplementedError, "has no sparse_prefill", q, k, v, backend="mosaic_gpu")
    wide = inputs(rng, 3, width=512)
    refuses(NotImplementedError, "at most 256", *wide, backend="triton")
