"""`mla_sparse_decode` and `mla_sparse_prefill`: against the float64 oracle, and against dense."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from csr import CLOSE, make_csr
from jax import ShapeDtypeStruct as Shape
from lowered import H200, TRITON_CALL
from oracles import QUICK_COMPILE, assert_within, float64
from token_lists import attend_lists, in_fp8, make_lists

from mla_jax import (
    lightning_indexer,
    mla_paged_decode,
    mla_paged_prefill,
    mla_sparse_decode,
    mla_sparse_prefill,
)

BACKENDS = ["reference", "triton"]
COUNTS = (64, 0, 1, 40, 128, 65)


def jitted(function, backend: str, **options):
    """A function of arrays, all of which are traced."""
    run = functools.partial(
        function, sm_scale=0.2, backend=backend, interpret=backend == "triton", **options
    )
    return jax.jit(run, compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [None, 3])
def test_decode(rng, backend, tokens):
    """[batch, heads, ..] and [batch, tokens, heads, ..], with lists of every length."""
    case = make_lists(rng, COUNTS, heads=3)
    leading = (6,) if tokens is None else (2, tokens)
    q_nope, q_pe, indices = (
        x.reshape(*leading, *x.shape[1:]) for x in (case.q_nope, case.q_pe, case.indices)
    )
    run = jitted(mla_sparse_decode, backend)
    out, lse = run(q_nope, q_pe, case.ckv_cache, case.kpe_cache, indices)
    assert out.shape == q_nope.shape
    assert lse.shape == q_nope.shape[:-1]
    want_out, want_lse = attend_lists(case, 0.2)
    assert_within(out, want_out.reshape(out.shape), CLOSE)
    assert_within(lse, want_lse.reshape(lse.shape), CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill(rng, backend):
    case = make_lists(rng, COUNTS, heads=2, page_size=64, gaps=False)
    out, lse = jitted(mla_sparse_prefill, backend)(*case.args)
    want_out, want_lse = attend_lists(case, 0.2)
    assert_within(out, want_out, CLOSE)
    assert_within(lse, want_lse, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rope(rng, backend):
    case = make_lists(rng, (20, 3), heads=2, topk=64, rope=0)
    out, lse = jitted(mla_sparse_decode, backend)(*case.args)
    want_out, want_lse = attend_lists(case, 0.2)
    assert_within(out, want_out, CLOSE)
    assert_within(lse, want_lse, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["slot", "tensor"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_fp8_cache(rng, dtype, bound, layout, backend):
    """Against the float64 oracle over the cache that the e4m3 one stands for; NaN where unused."""
    case = make_lists(rng, COUNTS, heads=3, latent=256, rope=32, dtype=dtype)
    stored, scales, exact = in_fp8(case, layout)
    assert np.isnan(float64(stored.ckv_cache)).any()
    run = jitted(mla_sparse_decode, backend)
    out, lse = run(*stored.args, kv_scales=scales)
    want_out, want_lse = attend_lists(exact, 0.2)
    assert out.dtype == case.q_nope.dtype
    assert_within(out, want_out, {1.0: bound})
    assert_within(lse, want_lse, {1.0: bound})


def test_fp8_prefill_and_splits(rng):
    case = make_lists(rng, (700, 3, 0), heads=2, topk=1024, latent=256, rope=32)
    stored, scales, exact = in_fp8(case, "slot")
    want_out, want_lse = attend_lists(exact, 0.2)
    prefill = jitted(mla_sparse_prefill, "triton")
    split = jitted(mla_sparse_decode, "triton", num_splits=3)
    for run in (prefill, split):
        out, lse = run(*stored.args, kv_scales=scales)
        assert_within(out, want_out, {1.0: 2e-5})
        assert_within(lse, want_lse, {1.0: 2e-5})


def test_fp8_scales_of_another_shape(rng):
    case = make_lists(rng, (3,), heads=2, topk=64, latent=256, rope=32)
    stored, scales, _ = in_fp8(case, "slot")
    with pytest.raises(ValueError, match=r"^kv_scales: got shape \(1, 1, 2\), expected \(1, 16, 2"):
        mla_sparse_decode(*stored.args, sm_scale=0.1, kv_scales=scales[:, :1])
    with pytest.raises(
        ValueError, match=r"^kv_scales: got an array, expected None for a ckv_cache"
    ):
        mla_sparse_decode(*case.args, sm_scale=0.1, kv_scales=scales)


def everything(rng, case, topk: int) -> jax.Array:
    """For each query of each request, all that it sees, in any order, among -1."""
    qo_indptr, kv_indptr, ids = (np.asarray(x) for x in case.args[4:])
    page_size = case.ckv_cache.shape[1]
    rows = []
    for b, last in enumerate(np.asarray(case.last)):
        pages = ids[kv_indptr[b] : kv_indptr[b + 1]]
        slots = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)
        slots = slots[: len(slots) - page_size + last] if len(pages) else slots
        n = qo_indptr[b + 1] - qo_indptr[b]
        for i in range(n):
            seen = max(len(slots) - n + i + 1, 0)
            row = np.full(topk, -1)
            row[rng.permutation(topk)[:seen]] = rng.permutation(slots[:seen])
            rows.append(row)
    return jnp.asarray(np.stack(rows), jnp.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_everything_is_dense_decode(rng, backend, tokens):
    """A list of all that a query sees gives what the dense kernel does: topk >= length."""
    lengths = [(tokens, m) for m in (128, 0, 1, 70)]
    case = make_csr(rng, lengths)
    q_nope, q_pe, *pools, indptr, ids = case.decode_args(tokens)
    dense = jitted(mla_paged_decode, backend)
    want = dense(q_nope, q_pe, *pools, indptr, ids, kv_last_page_len=case.last)
    indices = everything(rng, case, 128).reshape(4, tokens, 128)
    got = jitted(mla_sparse_decode, backend)(q_nope, q_pe, *pools, indices)
    for ours, theirs in zip(got, want, strict=True):
        assert_within(ours, float64(theirs), {1.0: 2e-6})


def test_everything_is_dense_prefill(rng):
    case = make_csr(rng, [(20, 50), (1, 0), (7, 7), (3, 64)])
    want = jitted(mla_paged_prefill, "reference")(*case.args, kv_last_page_len=case.last)
    indices = everything(rng, case, 64)
    got = jitted(mla_sparse_prefill, "triton")(*case.args[:4], indices)
    for ours, theirs in zip(got, want, strict=True):
        assert_within(ours, float64(theirs), {1.0: 2e-6})


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_indexer_chose(rng, backend):
    """From the indexer's vectors to attention over pages, causal by its choice alone."""
    batch, keys, topk = 2, 96, 64
    pages = jnp.asarray(rng.permutation(14)[:12].reshape(batch, 6), jnp.int32)
    q, k, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((batch, keys, 2, 64), (batch, keys, 64), (batch, keys, 2))
    )
    choose = jax.jit(
        functools.partial(lightning_indexer, topk=topk, page_size=16),
        compiler_options=QUICK_COMPILE,
    )
    indices = choose(q, k, weights, block_table=pages)
    case = make_lists(rng, (16 * 14,) * 2, heads=2, topk=256, num_pages=14)
    rows = jnp.asarray(rng.standard_normal((batch * keys, 2, 80)), jnp.float32)
    case = dataclasses.replace(
        case,
        q_nope=rows[..., :64],
        q_pe=rows[..., 64:],
        indices=indices.reshape(batch * keys, topk),
    )
    listed = (np.asarray(case.indices) >= 0).sum(axis=1).reshape(batch, keys)
    np.testing.assert_array_equal(
        listed, np.minimum(np.arange(1, keys + 1), topk)[None] + [[0]] * 2
    )
    out, lse = jitted(mla_sparse_prefill, backend)(*case.args)
    want_out, want_lse = attend_lists(case, 0.2)
    assert_within(out, want_out, CLOSE)
    assert_within(lse, want_lse, CLOSE)


def test_default_scale(rng):
    case = make_lists(rng, (20, 3), heads=2, topk=64, latent=512, rope=64)
    out, lse = mla_sparse_decode(*case.args, backend="reference")
    want_out, want_lse = attend_lists(case, 192**-0.5)
    assert_within(out, want_out, CLOSE)
    assert_within(lse, want_lse, {1.0: 3e-5})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapped", [("q", "indices"), ("q", "pools", "indices"), ("pools",)])
def test_vmap_is_a_loop(rng, backend, mapped):
    """Where pools are mapped, an index outside its own pool stays no key."""
    cases = [
        make_lists(rng, counts, heads=2, topk=64, latent=16, num_pages=5)
        for counts in ((64, 0, 9), (30, 1, 64))
    ]
    outside = jnp.asarray([-7, 80, 2**31 - 1], jnp.int32)
    cases = [
        dataclasses.replace(
            case,
            ckv_cache=jnp.nan_to_num(case.ckv_cache),
            kpe_cache=jnp.nan_to_num(case.kpe_cache),
            indices=case.indices.at[2, -3:].set(outside),
        )
        for case in cases
    ]
    groups = {"q": (0, 1), "pools": (2, 3), "indices": (4,)}
    moving = [i for name in mapped for i in groups[name]]
    args = [
        jnp.stack([case.args[i] for case in cases]) if i in moving else cases[0].args[i]
        for i in range(5)
    ]
    run = jax.vmap(
        functools.partial(
            mla_sparse_decode, sm_scale=0.2, backend=backend, interpret=backend == "triton"
        ),
        in_axes=tuple(0 if i in moving else None for i in range(5)),
    )
    outs, lses = jax.jit(run, compiler_options=QUICK_COMPILE)(*args)
    fields = [field.name for field in dataclasses.fields(cases[0])]
    for case, out, lse in zip(cases, outs, lses, strict=True):
        alone = dataclasses.replace(cases[0], **{fields[i]: case.args[i] for i in moving})
        want_out, want_lse = attend_lists(alone, 0.2)
        assert_within(out, want_out, CLOSE)
        assert_within(lse, want_lse, CLOSE)


def test_vmap_makes_one_launch():
    shapes = (
        Shape((5, 4, 16, 512), jnp.bfloat16),
        Shape((5, 4, 16, 64), jnp.bfloat16),
        Shape((100, 64, 512), jnp.bfloat16),
        Shape((100, 64, 64), jnp.bfloat16),
        Shape((5, 4, 128), jnp.int32),
    )
    run = jax.vmap(lambda *args: mla_sparse_decode(*args, backend="triton"), (0, 0, None, None, 0))
    with jax.sharding.use_abstract_mesh(H200):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert TRITON_CALL.findall(lowered.as_text()) == ["mla_paged_attention", "mla_paged_merge"]


REFUSED = [
    ({"q_nope": jnp.ones((2, 64))}, r"q_nope: got shape \(2, 64\), expected \[batch, heads, w"),
    ({"q_pe": jnp.ones((2, 3, 16))}, r"q_pe: got shape \(2, 3, 16\), expected \(2, 2\) and the"),
    ({"indices": jnp.zeros((3, 64), jnp.int32)}, r"indices: got shape \(3, 64\), expected \(2,\)"),
    ({"indices": jnp.zeros((2, 96), jnp.int32)}, "indices: got 96 a query, expected a multiple"),
    ({"indices": jnp.full((2, 64), 32)}, "indices: got 32 to 32, expected page * page_size"),
    ({"indices": jnp.full((2, 64), -2)}, "indices: got -2 to -2, expected page * page_size"),
    ({"ckv_cache": jnp.ones((2, 16))}, r"ckv_cache: got shape \(2, 16\), expected \[pages, page"),
    ({"sm_scale": None}, "sm_scale: got None for latent 64 and rope 16, expected a value"),
    ({"num_splits": 0}, "num_splits: got 0, expected None or at least 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refusals(change, message):
    """One line, with the argument, what came and what was expected."""
    args = {"q_nope": jnp.ones((2, 2, 64)), "q_pe": jnp.ones((2, 2, 16)), "sm_scale": 0.1}
    args |= {"ckv_cache": jnp.ones((2, 16, 64)), "kpe_cache": jnp.ones((2, 16, 16))}
    args |= {"indices": jnp.zeros((2, 64), jnp.int32)}
    message = message.replace("page * page_size", re.escape("page * page_size"))
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        mla_sparse_decode(**args | change)
    assert "\n" not in str(refusal.value)


def test_prefill_refuses_an_axis_of_requests():
    q = jnp.ones((2, 3, 2, 16))
    with pytest.raises(ValueError, match=r"^q_nope: got shape \(2, 3, 2, 16\), expected \[tokens"):
        mla_sparse_prefill(
            *(q, q, jnp.ones((2, 16, 16)), jnp.ones((2, 16, 16))),
            jnp.zeros((2, 3, 64), jnp.int32),
            0.1,
        )
