"""Grouped decode against a float64 oracle: the reference, and the Triton kernel interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import (
    BLOCK,
    BOUNDS,
    FP8,
    LSE,
    GroupedCase,
    decode_attention,
    make_grouped,
    out_dtype,
    some_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within

from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.grouped_decode.tiles import default_tiles, problem_of
from pallas_kernels.grouped_decode.triton import grouped_decode_triton

LENGTHS = (0, 1, 63, 64, 65, 192, 130)


def run(case: GroupedCase, mask, backend: str, **options):
    call = functools.partial(
        grouped_decode, sm_scale=0.3, backend=backend, interpret=backend == "triton", **options
    )
    return jax.jit(call, compiler_options=QUICK_COMPILE)(*case.args, mask)


def check(case: GroupedCase, mask, backend: str, **options) -> None:
    out, lse = run(case, mask, backend, **options)
    want_out, want_lse = decode_attention(case, mask, 0.3)
    dtype = str(case.q.dtype)
    assert out.dtype == out_dtype(dtype)
    assert_within(out, want_out, BOUNDS[dtype])
    assert_within(lse, want_lse, LSE[dtype])


@pytest.mark.parametrize("kind", [None, "bool", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", FP8])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dtypes_and_masks(rng, backend, dtype, kind):
    case = make_grouped(rng, LENGTHS, dtype=dtype)
    heads = int(rng.choice([1, 4]))
    mask = some_mask(rng, kind, (len(LENGTHS), heads, 192 + int(rng.integers(0, 9))))
    check(case, mask, backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("heads", "width"), [((1, 1), 64), ((3, 3), 192), ((20, 1), 128), ((70, 1), 32), ((8, 4), 256)]
)
def test_heads_and_widths(rng, heads, width, backend):
    """More heads in a group than a tile has rows, too; a width that is held in two parts."""
    case = make_grouped(rng, (65, 0, 128), heads=heads, width=width, blocks=2)
    check(case, None, backend)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_splits", [None, 1, 2, 5])
def test_splits(rng, num_splits, deterministic):
    case = make_grouped(rng, (700, 5, 0, 320), width=32, blocks=11, heads=(6, 2))
    mask = some_mask(rng, "bool", (4, 6, 700))
    check(case, mask, "triton", num_splits=num_splits, deterministic=deterministic)


def test_split_heads_of_192(rng):
    """The merge holds them as 256 columns, of which 64 are nobody's."""
    case = make_grouped(rng, (400, 130), width=192, blocks=7, heads=(2, 1))
    check(case, None, "triton", num_splits=3)


def test_all_masked(rng):
    case = make_grouped(rng, (65, 130))
    hidden = jnp.zeros((2, 1, 130), jnp.bool_)
    for mask in (hidden, jnp.where(hidden, 0.0, -jnp.inf)):
        for backend in ("reference", "triton"):
            out, lse = run(case, mask, backend)
            np.testing.assert_array_equal(out, 0.0)
            np.testing.assert_array_equal(lse, -np.inf)


def test_deterministic(rng):
    """A request's bits do not depend on the others' lengths."""
    case = make_grouped(rng, (700, 704, 704), width=32, blocks=11)
    results = [
        run(
            GroupedCase(**{**vars(case), "length": jnp.asarray(lengths, jnp.int32)}),
            None,
            "triton",
            deterministic=True,
        )
        for lengths in [(700, 704, 704), (700, 0, 3)]
    ]
    for whole, alone in zip(*results, strict=True):
        np.testing.assert_array_equal(whole[0], alone[0])


def test_one_compile_serves_all(rng):
    """Lengths and tables are traced; garbage in them stays inside the arrays."""
    traced = []

    @jax.jit
    def call(*args):
        traced.append(None)
        return grouped_decode(*args, sm_scale=0.3, backend="triton", interpret=True)

    for lengths in [(0, 0), (64, 1), (192, 100)]:
        case = make_grouped(rng, lengths)
        out, _ = call(*case.args)
        assert_within(out, decode_attention(case, None, 0.3)[0], BOUNDS["float32"])
    assert len(traced) == 1
    full = make_grouped(rng, (192, 192))
    for lengths in [(10**6, -5), (-(2**31), 2**31 - 1)]:
        out, lse = call(*full.args[:4], jnp.asarray(lengths, jnp.int32))
        clipped = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, 192)
        want = call(*full.args[:4], clipped)
        np.testing.assert_array_equal(out, want[0])
        np.testing.assert_array_equal(lse, want[1])


def test_keys_behind_a_mask_are_not_seen(rng):
    case = make_grouped(rng, (130,))
    mask = jnp.ones((1, 1, 70), jnp.bool_)
    short = make_grouped(rng, (70,))
    short = GroupedCase(**{**vars(case), "length": short.length})
    for backend in ("reference", "triton"):
        out, _ = run(case, mask, backend)
        assert_within(out, decode_attention(short, None, 0.3)[0], BOUNDS["float32"])


@settings(max_examples=6, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_any_case(data, seed):
    rng = np.random.default_rng(seed)
    blocks = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, blocks * BLOCK), min_size=1, max_size=3))
    kv_heads, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    heads = (kv_heads * ratio, kv_heads)
    case = make_grouped(rng, tuple(lengths), heads=heads, blocks=blocks)
    kind = data.draw(st.sampled_from([None, "bool", "float32"]))
    mask_heads = data.draw(st.sampled_from([1, heads[0]]))
    mask = some_mask(rng, kind, (len(lengths), mask_heads, blocks * BLOCK))
    for backend in ("reference", "triton"):
        check(case, mask, backend, num_splits=data.draw(st.sampled_from([None, 2])))


@pytest.mark.parametrize("keys", [32, 64])
@pytest.mark.parametrize("mask_all", [False, True])
def test_tiles(rng, keys, mask_all):
    case = make_grouped(rng, LENGTHS, heads=(20, 1))
    tiles = default_tiles(problem_of(case.args[0], case.k_cache))
    changes = {"rows": 16, "keys": keys, "mask_all": mask_all}
    out, _ = grouped_decode_triton(
        *(*case.args, None, jnp.float32(0.3)),
        num_splits=None,
        deterministic=False,
        interpret=True,
        tiles=type(tiles)(**{**vars(tiles), **changes}),
    )
    assert_within(out, decode_attention(case, None, 0.3)[0], BOUNDS["float32"])


def test_errors(rng):
    case = make_grouped(rng, (65, 64))
    q, k, v, table, length = case.args

    def refuses(error, match, *args, **options):
        with pytest.raises(error, match=match):
            grouped_decode(*args, sm_scale=1.0, **options)

    refuses(ValueError, r"q: got shape .* expected \[batch, heads", q[0], k, v, table, length)
    refuses(ValueError, "v_cache: got shape", q, k, v[:, :1], table, length)
    refuses(ValueError, "k_cache: got shape .* divisor of 3", q[:, :3], k, v, table, length)
    refuses(TypeError, "k_cache: got dtype", q, k.astype(jnp.bfloat16), v, table, length)
    integers = [array.astype(jnp.int32) for array in (q, k, v)]
    refuses(TypeError, "q: got dtype int32", *integers, table, length)
    refuses(ValueError, "block_table: got shape", q, k, v, table[:, :1], length)
    refuses(TypeError, "length: got dtype float32", q, k, v, table, length.astype(jnp.float32))
    mask = jnp.ones((2, 3, 65), jnp.bool_)
    refuses(ValueError, "mask: got shape", *case.args, mask)
    refuses(TypeError, "mask: got dtype int32", *case.args, mask[:, :1].astype(jnp.int32))
    refuses(ValueError, "num_splits: got 0", *case.args, num_splits=0)
    refuses(ValueError, "backend: got 'x'", *case.args, backend="x")
    refuses(NotImplementedError, "has no grouped_decode", *case.args, backend="mosaic_gpu")
    for width, reason in ((512, "at most 256"), (100, "power of two")):
        wide = make_grouped(rng, (1,), width=width, blocks=1)
        refuses(NotImplementedError, reason, *wide.args, backend="triton")
