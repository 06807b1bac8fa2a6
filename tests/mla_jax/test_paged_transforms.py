"""The paged functions under JAX's transformations: vmap, gradients, export; and merged results."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from csr import CLOSE, attend_csr, make_csr
from jax import ShapeDtypeStruct as Shape
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from oracles import QUICK_COMPILE, assert_within, float64

from mla_jax import merge_states, mla_paged_decode, mla_paged_prefill

BACKENDS = ["reference", "triton"]
OPS = {"decode": mla_paged_decode, "prefill": mla_paged_prefill}
H200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
TRITON_CALL = re.compile(r'custom_call @__gpu\$xla\.gpu\.triton\(.*\bname = "(\w+)"')


def call(op: str, backend: str):
    """A function of (queries, pools, requests, sm_scale), each a tuple or a scalar."""

    def run(queries, pools, requests, sm_scale):
        last, *indptr_and_ids = requests
        return OPS[op](
            *(*queries, *pools, *indptr_and_ids),
            sm_scale=sm_scale,
            kv_last_page_len=last,
            backend=backend,
            interpret=backend == "triton",
        )

    return run


def arguments(rng, op: str, count: int):
    """`count` calls' (queries, pools, requests, sm_scale) of the same shapes, stacked."""
    rows = []
    for _ in range(count):
        lengths = [(1, int(m)) for m in rng.integers(0, 50, 3)]
        if op == "prefill":
            lengths = [
                (int(n), m) for n, (_, m) in zip(rng.integers(0, 5, 3), lengths, strict=True)
            ]
        tokens = 3 if op == "decode" else 14
        # Every page is filled: a call may read another's list of them.
        case = make_csr(rng, lengths, tokens=tokens, num_pages=16, num_ids=18, unused=0.5)
        case = dataclasses.replace(
            case, q_nope=jnp.nan_to_num(case.q_nope), q_pe=jnp.nan_to_num(case.q_pe)
        )
        args = case.args if op == "prefill" else case.decode_args()
        rows.append((args[:2], args[2:4], (case.last, *args[4:]), jnp.float32(rng.uniform(0.1, 1))))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def take(arguments, mapped, index):
    return [
        jax.tree.map(lambda x: x[index], a) if i in mapped else a for i, a in enumerate(arguments)
    ]


def agree(got, want) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert_within(ours, float64(theirs), CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mapped", [(0, 2), (0,), (2,), (0, 1, 2), (1,), (0, 3)])
def test_vmap_is_a_loop(rng, op, backend, mapped):
    """mapped: which of the queries, the pools, the requests and the scale."""
    stacked = arguments(rng, op, 3)
    args = [a if i in mapped else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(stacked)]
    axes = tuple(0 if i in mapped else None for i in range(4))
    run = jax.jit(jax.vmap(call(op, backend), axes), compiler_options=QUICK_COMPILE)
    outs, lses = run(*args)
    alone = jax.jit(call(op, "reference"), compiler_options=QUICK_COMPILE)
    for i, results in enumerate(zip(outs, lses, strict=True)):
        agree(results, alone(*take(args, mapped, i)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_nested_vmap(rng, op, backend):
    """The outer axis maps queries and pools, the inner one queries and requests, last axis out."""
    outer, inner = arguments(rng, op, 2), arguments(rng, op, 3)
    queries = jax.tree.map(
        lambda a, b: a[:, None] + b[None], outer[0], inner[0]
    )  # [outer, inner, ...]
    pools, requests, scale = outer[1], inner[2], jnp.float32(0.3)
    run = jax.vmap(call(op, backend), (0, None, 0, None), out_axes=-1)
    run = jax.jit(jax.vmap(run, (0, 0, None, None)), compiler_options=QUICK_COMPILE)
    outs, lses = run(queries, pools, requests, scale)
    alone = jax.jit(call(op, "reference"), compiler_options=QUICK_COMPILE)
    for i, j in np.ndindex(2, 3):
        at_i, at_j = (functools.partial(jax.tree.map, lambda x, k=k: x[k]) for k in (i, j))
        want = alone(at_j(at_i(queries)), at_i(pools), at_j(requests), scale)
        agree((outs[i, ..., j], lses[i, ..., j]), want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mapped", [(0, 2), (0, 1, 2)])
def test_vmap_makes_one_launch(rng, op, mapped):
    stacked = arguments(rng, op, 5)
    args = [a if i in mapped else jax.tree.map(lambda x: x[0], a) for i, a in enumerate(stacked)]
    run = jax.vmap(
        lambda q, pools, requests, scale: OPS[op](
            *(*q, *pools, *requests[1:]), sm_scale=scale, backend="triton"
        ),
        tuple(0 if i in mapped else None for i in range(4)),
    )
    with jax.sharding.use_abstract_mesh(H200):
        lowered = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
    assert TRITON_CALL.findall(lowered.as_text()) == ["mla_paged_attention", "mla_paged_merge"]


def forward(f):
    return lambda *args: jax.jvp(lambda queries: f(queries, *args[1:]), args[:1], args[:1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("maps", "transform"),
    [
        (0, jax.grad),
        (0, forward),
        (1, lambda f: jax.vmap(jax.grad(f))),
        (1, lambda f: jax.grad(lambda *args: jax.vmap(f)(*args).sum())),
        (2, lambda f: jax.vmap(jax.grad(lambda *args: jax.vmap(f)(*args).sum()))),
    ],
    ids=["grad", "jvp", "vmap of grad", "grad of vmap", "vmap of grad of vmap"],
)
def test_the_kernel_refuses_gradients(rng, op, maps, transform):
    args = jax.tree.map(lambda x: x[0], arguments(rng, op, 1))
    args = jax.tree.map(lambda x: jnp.broadcast_to(x, (2,) * maps + x.shape), args)

    def loss(*args):
        return call(op, "triton")(*args)[0].sum()

    message = f'^paged_{op}: the Pallas backends have no gradient, use backend="reference"'
    for run in (loss, jax.jit(loss)):
        with pytest.raises(NotImplementedError, match=message):
            transform(run)(*args)


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_in_a_loss_that_does_not_differentiate_it(rng, op):
    args = jax.tree.map(lambda x: x[0], arguments(rng, op, 1))

    def loss(x, args):
        out, _ = call(op, "triton")(*jax.lax.stop_gradient(args))
        return x * out.sum(), out.sum()

    gradient, total = jax.jit(jax.grad(loss, has_aux=True))(jnp.float32(2), args)
    np.testing.assert_allclose(gradient, total, rtol=1e-6)


def test_the_reference_is_differentiable(rng):
    """In queries and pools, against the dense formula of one request."""
    case = make_csr(rng, [(3, 23)], unused=0.5)
    pages = np.asarray(case.kv_indices)[:2]

    def loss(q_nope, q_pe, ckv, kpe):
        out, lse = mla_paged_prefill(
            *(q_nope, q_pe, ckv, kpe, *case.args[4:]),
            sm_scale=0.2,
            kv_last_page_len=case.last,
            backend="reference",
        )
        return (out**2).sum() + lse.sum()

    def dense(q_nope, q_pe, ckv, kpe):
        keys, rope = (pool[pages].reshape(32, -1)[:23] for pool in (ckv, kpe))
        dot = functools.partial(jnp.einsum, precision="highest")
        scores = (dot("thc,kc->htk", q_nope, keys) + dot("thr,kr->htk", q_pe, rope)) * 0.2
        scores = jnp.where(np.tri(3, 23, 20, dtype=bool), scores, -1e30)
        out = dot("htk,kc->htc", jax.nn.softmax(scores), keys)
        return (out**2).sum() + jax.nn.logsumexp(scores, -1).sum() / np.log(2)

    arrays = case.args[:4]
    got, want = (jax.grad(f, (0, 1, 2, 3))(*arrays) for f in (loss, dense))
    for ours, theirs in zip(got, want, strict=True):
        assert_within(ours, float64(theirs), {1.0: 5e-5})


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_merge_to_the_whole(rng, backend):
    """Prefix and suffix lists of pages, cut anywhere, an empty half included."""
    case = make_csr(rng, [(1, 61), (1, 16), (1, 0), (1, 40)])
    q_nope, q_pe, ckv, kpe, *_ = case.decode_args()
    indptr = np.asarray(case.kv_indptr)
    cut = np.asarray([rng.integers(0, count + 1) for count in np.diff(indptr)])
    lists = np.split(np.asarray(case.kv_indices), indptr[1:])
    prefix = [pages[:n] for pages, n in zip(lists, cut, strict=False)]
    suffix = [pages[n:] for pages, n in zip(lists, cut, strict=False)]
    # Where the cut leaves nothing to the suffix, the prefix ends with the last page.
    full = np.full(4, 16)
    lasts = np.where(cut == np.diff(indptr), np.asarray(case.last), full), np.asarray(case.last)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def part(indptr, ids, last):
        return mla_paged_decode(
            *(q_nope, q_pe, ckv, kpe, indptr, ids),
            sm_scale=0.2,
            kv_last_page_len=last,
            backend=backend,
            interpret=backend == "triton",
        )

    states = []
    for pages, last in zip((prefix, suffix), lasts, strict=True):
        ids = np.concatenate([*pages, np.full(20, -1)])[:20].astype(np.int32)
        counts = np.cumsum([0, *(len(p) for p in pages)]).astype(np.int32)
        states += part(jnp.asarray(counts), jnp.asarray(ids), jnp.asarray(last, jnp.int32))
    agree(merge_states(*states), attend_csr(case, 0.2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_prefix_is_one_request_of_many_heads(rng, backend):
    """Every request's heads as heads of one request over the prefix; each its own suffix."""
    batch, heads, latent, rope = 3, 2, 32, 16
    case = make_csr(rng, [(1, 32 + m) for m in (5, 30, 16)], unused=0.5)
    indptr, ids = np.asarray(case.kv_indptr), np.asarray(case.kv_indices).copy()
    prefix = ids[:2].copy()
    for first in indptr[:-1]:
        ids[first : first + 2] = prefix
    case = dataclasses.replace(case, kv_indices=jnp.asarray(ids))
    q_nope, q_pe, ckv, kpe, *_ = case.decode_args()
    run = functools.partial(
        mla_paged_decode, sm_scale=0.2, backend=backend, interpret=backend == "triton"
    )
    shared, shared_lse = run(
        q_nope.reshape(1, batch * heads, latent),
        q_pe.reshape(1, batch * heads, rope),
        *(ckv, kpe, jnp.array([0, 2]), jnp.asarray(prefix)),
    )
    own = [ids[first + 2 : past] for first, past in itertools.pairwise(indptr)]
    own_indptr = np.cumsum([0, *map(len, own)]).astype(np.int32)
    out, lse = run(
        *(q_nope, q_pe, ckv, kpe, jnp.asarray(own_indptr), jnp.asarray(np.concatenate(own))),
        kv_last_page_len=case.last,
    )
    merged = merge_states(shared.reshape(out.shape), shared_lse.reshape(lse.shape), out, lse)
    agree(merged, attend_csr(case, 0.2))


@pytest.mark.parametrize("op", OPS)
def test_export(op):
    """For an H200 on a machine without a GPU; the caller vouches for Triton's custom calls."""

    def ints(size: int) -> Shape:
        return Shape((size,), jnp.int32)

    def half(*shape: int) -> Shape:
        return Shape(shape, jnp.bfloat16)

    queries, pools = (half(5, 16, 512), half(5, 16, 64)), (half(99, 64, 512), half(99, 64, 64))
    indptr = (ints(6),) if op == "decode" else (ints(6), ints(6))
    run = jax.jit(functools.partial(OPS[op], backend="triton"))
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with jax.sharding.use_abstract_mesh(H200):
        exported = export.export(run, platforms=["cuda"], disabled_checks=checks)(
            *queries, *pools, *indptr, ints(40)
        )
    assert [x.shape for x in exported.out_avals] == [(5, 16, 512), (5, 16)]
    pytest.importorskip("flatbuffers", reason="jax serializes exported functions with it")
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    for ours, theirs in (
        (again.in_avals, exported.in_avals),
        (again.out_avals, exported.out_avals),
    ):
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    names = TRITON_CALL.findall(again.mlir_module())
    assert names == ["mla_paged_attention", "mla_paged_merge"]
