"""Paged attention over float8_e4m3fn caches, against exact attention over what they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_pages import FP8, KINDS, make_fp8
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    GARBAGE,
    QUICK_COMPILE,
    PrefillCase,
    assert_within,
    prefill_attention,
)
from paged_decode_suite import LSE, OUT, ragged

from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill

BACKENDS = ({"backend": "reference"}, {"backend": "triton", "interpret": True})
SM_SCALE = 0.03  # scores of order 1, at most


@functools.cache
def jitted(num_splits, backend, interpret=False):
    def run(kv_scales, *args):
        options = {"num_splits": num_splits, "backend": backend, "interpret": interpret}
        return paged_decode(*args, sm_scale=SM_SCALE, kv_scales=kv_scales, **options)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def check(fp8, options, num_splits=1):
    out, lse = jitted(num_splits, **options)(fp8.kv_scales, *fp8.case.args)
    want_out, want_lse = fp8.want(SM_SCALE)
    dtype = str(fp8.case.q_nope.dtype)
    assert out.dtype == dtype
    # Half precision rounds the weights once more, by slot with their scale.
    assert_within(out, want_out, OUT[dtype])
    assert_within(lse, want_lse, LSE)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(rng, page_size):
    for options, kind in zip(BACKENDS * 2, ("slot", "slot", "tensor", "tensor"), strict=True):
        sizes = {"latent": 256, "rope": 32, "heads": 5, "page_size": page_size}
        check(make_fp8(rng, kind, lengths=ragged(page_size), **sizes), options, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(rng, kind):
    """At DeepSeek's widths, one tile of rows and several."""
    cases = zip(
        ("bfloat16", "float16", "bfloat16"), BACKENDS + BACKENDS[1:], (3, 3, 70), strict=True
    )
    for dtype, options, heads in cases:
        sizes = {"latent": 512, "rope": 64, "heads": heads, "page_size": 64}
        check(make_fp8(rng, kind, lengths=(0, 1, 64, 130), dtype=dtype, **sizes), options, 2)


@pytest.mark.parametrize(("latent", "rope"), [(16, 0), (64, 16), (128, 64), (512, 32)])
def test_widths(rng, latent, rope):
    for kind in ("slot", "tensor_kpe"):
        sizes = {"latent": latent, "rope": rope, "heads": 3, "page_size": 16, "tokens": 2}
        check(make_fp8(rng, kind, lengths=(0, 1, 40, 65), **sizes), BACKENDS[1])


def test_a_width_of_no_kernel(rng):
    """200 columns: the last group is shorter."""
    for kind in KINDS:
        fp8 = make_fp8(rng, kind, latent=200, rope=6, heads=2, lengths=(0, 9, 31), page_size=5)
        check(fp8, BACKENDS[0])


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    page_size=st.sampled_from([1, 3, 32, 64, 128]),
    heads=st.sampled_from([1, 2, 5, 16, 40]),
    tokens=st.integers(1, 8),
    rope=st.sampled_from([0, 16]),
    kind=st.sampled_from(KINDS),
    options=st.sampled_from(BACKENDS),
    num_splits=st.sampled_from([1, 3, None]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_case(lengths, page_size, heads, tokens, rope, kind, options, num_splits, seed):
    sizes = {"heads": heads, "tokens": tokens, "rope": rope, "latent": 256}
    rng = np.random.default_rng(seed)
    fp8 = make_fp8(rng, kind, lengths=tuple(lengths), page_size=page_size, **sizes)
    check(fp8, options, num_splits)


@pytest.mark.parametrize("options", BACKENDS)
def test_nothing_cached(rng, options):
    for kind in ("slot", "tensor"):
        fp8 = make_fp8(rng, kind, lengths=(0, 0), page_size=16, heads=3)
        out, lse = jitted(1, **options)(fp8.kv_scales, *fp8.case.args)
        np.testing.assert_array_equal(out, np.zeros(out.shape))
        np.testing.assert_array_equal(lse, np.full(lse.shape, -np.inf))


@pytest.mark.parametrize("options", BACKENDS)
def test_ids_out_of_range(rng, options):
    """The nearest page of the pool is read, with its own scales."""
    fp8 = make_fp8(rng, "slot", lengths=(0, 70, 33, 9), page_size=16, heads=3)
    pools = {"ckv_cache": fp8.case.ckv_cache, "kpe_cache": fp8.case.kpe_cache}
    finite = {name: jnp.nan_to_num(pool.astype(jnp.float32)) for name, pool in pools.items()}
    finite = {name: pool.astype(pools[name].dtype) for name, pool in finite.items()}
    assert fp8.kv_scales is not None
    scales = jnp.nan_to_num(fp8.kv_scales, nan=0.7)
    replaced = rng.random(len(fp8.case.page_ids)) < 0.5
    ids = np.where(replaced, rng.choice(GARBAGE, replaced.size), np.asarray(fp8.case.page_ids))
    inside = np.clip(ids, 0, len(scales) - 1)
    spread = np.repeat(np.asarray(scales, np.float64), 128, -1)[..., :64]
    exact = dataclasses.replace(
        fp8.case,
        ckv_cache=np.asarray(finite["ckv_cache"]).astype(np.float64) * spread,  # pyright: ignore[reportArgumentType]
        kpe_cache=finite["kpe_cache"],
        page_ids=jnp.asarray(inside, jnp.int32),
    )
    case = dataclasses.replace(fp8.case, **finite, page_ids=jnp.asarray(ids, jnp.int32))
    check(dataclasses.replace(fp8, case=case, kv_scales=scales, exact=exact), options)


@pytest.mark.parametrize("kind", ["slot", "tensor_kpe"])
@pytest.mark.parametrize("pools_mapped", [False, True])
def test_vmap(rng, kind, pools_mapped):
    """Two calls in one launch, or one after the other where each has a scale of its own."""
    both = [
        make_fp8(rng, kind, lengths=(20, 0, 33), page_size=16, heads=3, num_pages=8, num_ids=16)
        for _ in range(2)
    ]
    if not pools_mapped:
        both[1] = dataclasses.replace(
            both[0],
            case=dataclasses.replace(both[0].case, q_nope=both[1].case.q_nope),
            exact=dataclasses.replace(both[0].exact, q_nope=both[1].case.q_nope),
        )

    def run(kv_scales, *args):
        options = {"backend": "triton", "interpret": True, "kv_scales": kv_scales}
        return paged_decode(*args, sm_scale=SM_SCALE, **options)

    shared = {"ckv_cache", "kpe_cache"} if not pools_mapped else set()
    args: list = []
    axes: list[int | None] = []
    for name in ("kv_scales", *(field.name for field in dataclasses.fields(both[0].case))):
        values: list = [
            one.kv_scales if name == "kv_scales" else getattr(one.case, name) for one in both
        ]
        is_shared = name in shared or (name == "kv_scales" and not pools_mapped)
        args.append(values[0] if is_shared else jnp.stack(values))
        axes.append(None if is_shared else 0)
    out, lse = jax.jit(jax.vmap(run, axes), compiler_options=QUICK_COMPILE)(*args)
    for i, fp8 in enumerate(both):
        want = fp8.want(SM_SCALE)
        assert_within(out[i], want[0], OUT["float32"])
        assert_within(lse[i], want[1], LSE)


@pytest.mark.parametrize("kind", ["slot", "tensor_kpe"])
@pytest.mark.parametrize("options", BACKENDS)
def test_prefill(rng, options, kind):
    """Queries of every request among padding, over the same pools."""
    counts, lengths = (3, 0, 5, 2), (40, 7, 3, 70)
    fp8 = make_fp8(rng, kind, lengths=lengths, page_size=16, heads=2, latent=256, rope=16)
    rows = sum(counts)
    q = [jnp.asarray(rng.standard_normal((rows, 2, width)), jnp.float32) for width in (256, 16)]
    starts = np.cumsum([0, *counts[:-1]])
    requests = {
        "q_start": jnp.asarray(starts, jnp.int32),
        "q_count": jnp.asarray(counts, jnp.int32),
    }

    def of(case):
        rest = {name: getattr(case, name) for name in ("page_ids", "start", "length")}
        pools = {"ckv_cache": case.ckv_cache, "kpe_cache": case.kpe_cache}
        return PrefillCase(q_nope=q[0], q_pe=q[1], **pools, **rest, **requests)

    call = functools.partial(paged_prefill, sm_scale=SM_SCALE, kv_scales=fp8.kv_scales, **options)
    out, lse = jax.jit(call, compiler_options=QUICK_COMPILE)(*of(fp8.case).args)
    want = prefill_attention(of(fp8.exact), SM_SCALE)
    assert_within(out, want[0], OUT["float32"])
    assert_within(lse, want[1], LSE)


def test_errors(rng):
    fp8 = make_fp8(rng, "slot", lengths=(20,), page_size=16, heads=2, latent=256)
    case, scales = fp8.case, fp8.kv_scales
    assert scales is not None

    def refuses(error, match, *, kv_scales=scales, backend=None, **changes):
        with pytest.raises(error, match=match):
            paged_decode(
                *dataclasses.replace(case, **changes).args,
                sm_scale=0.1,
                kv_scales=kv_scales,
                backend=backend,
            )

    ckv, kpe = case.ckv_cache, case.kpe_cache
    refuses(
        TypeError,
        r"ckv_cache: got dtype float16, .* or float8_e4m3fn",
        ckv_cache=ckv.astype("float16"),
    )
    refuses(ValueError, "kv_scales: got an array, expected None", ckv_cache=ckv.astype("float32"))
    refuses(
        ValueError, r"kv_scales: got shape .* expected \(\d+, 16, 2\)", kv_scales=scales[..., :1]
    )
    refuses(ValueError, "kv_scales: got shape", kv_scales=scales[0])
    refuses(TypeError, "kv_scales: got dtype bfloat16", kv_scales=scales.astype("bfloat16"))
    refuses(TypeError, "kpe_cache: got dtype float8_e4m3fn", kpe_cache=kpe.astype(FP8))
    refuses(TypeError, "kpe_cache: got dtype bfloat16", kpe_cache=kpe.astype("bfloat16"))
    refuses(TypeError, "q_pe: got dtype float16", q_pe=case.q_pe.astype("float16"))
    half = {
        name: getattr(case, name).astype("bfloat16") for name in ("q_nope", "q_pe", "kpe_cache")
    }
    refuses(NotImplementedError, "jax is|rope is 16, a box of", backend="mosaic_gpu", **half)
