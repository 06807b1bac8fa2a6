"""Context parallelism: pages anywhere, partial results merged, against a float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from meshed import mesh_of

from mla_jax.cache import PagedLatentCache
from mla_jax.sharding.collectives import merge_over_context, once_over_context
from pallas_kernels.paged_decode import paged_decode

CONTEXTS = (2, 4, 8)
HEADS, LATENT, ROPE, PAGE, MAX_PAGES, BATCH = 2, 8, 4, 4, 6, 3


def exact_merge(outs: np.ndarray, lses: np.ndarray) -> np.ndarray:
    """[context, *rows, width] and base-2 [context, *rows] -> the weighted mean, in float64."""
    top = np.max(lses, axis=0)
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp2(lses.astype(np.float64) - top)
    total = weights.sum(axis=0)
    outs = np.where(np.isneginf(lses)[..., None], 0.0, outs.astype(np.float64))
    return (outs * weights[..., None]).sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]


@functools.cache
def merged_on(context: int):
    part = jax.shard_map(
        lambda out, lse: merge_over_context(out[0], lse[0]),
        mesh=mesh_of({"context": context}),
        in_specs=(P("context"), P("context")),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(part)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_merge_is_exact(rng, context, dtype):
    """Empty states whatever their `out` holds, far-apart ones, rows that nobody has keys of."""
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    outs = rng.standard_normal((context, 5, 3, 7), np.float32).astype(kind)
    lses = rng.uniform(-300, 300, (context, 5, 3)).astype(np.float32)
    lses[:, 1] = rng.uniform(-1, 1, (context, 3))
    empty = rng.random((context, 5, 3)) < 0.4
    empty[:, 2] = True
    lses[empty], outs[empty] = -np.inf, np.nan
    got = merged_on(context)(outs, lses)
    assert got.dtype == kind
    bound = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    want = exact_merge(outs, lses)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=bound, atol=bound / 4)
    assert (np.asarray(got, np.float64)[2] == 0).all()


def test_one_message_of_the_size_of_its_contents():
    """float32's log-sum-exp rides in the same all-gather as bfloat16's values, as it is."""
    out = jax.ShapeDtypeStruct((4, 3, 2, 16), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((4, 3, 2), jnp.float32)
    program = str(jax.make_jaxpr(merged_on(4))(out, lse))
    assert program.count("all_gather[") == 1
    assert "u16[4,3,2,18]" in program
    assert "psum" not in program


def test_a_context_of_one_exchanges_nothing():
    out, lse = jnp.ones((3, 2, 4)), jnp.zeros((3, 2))
    assert merge_over_context(out, lse) is out
    assert once_over_context(lse) is lse


@functools.cache
def attend_on(context: int):
    """Write one token a row, then attend, on pages spread over `context` devices."""

    def part(q_nope, q_pe, ckv, kpe, table, lengths, new_ckv, new_kpe):
        cache = PagedLatentCache(ckv=(ckv,), kpe=(kpe,), block_table=table, lengths=lengths)
        view = cache.view(1, jnp.ones_like(lengths))
        ckv = ckv.at[view.page, view.slot].set(new_ckv[:, None], mode="drop")
        kpe = kpe.at[view.page, view.slot].set(new_kpe[:, None], mode="drop")
        held = view.held(view.length, PAGE)
        out, lse = paged_decode(
            *(q_nope, q_pe, ckv, kpe, view.page_ids, view.start, held),
            sm_scale=0.3,
            backend="reference",
        )
        return merge_over_context(out, lse), ckv, kpe, view.length, held[None]

    pool = P("context")
    return jax.jit(
        jax.shard_map(
            part,
            mesh=mesh_of({"context": context}),
            in_specs=(P(), P(), pool, pool, P(), P(), P(), P()),
            out_specs=(P(), pool, pool, P(), pool),
            check_vma=False,
        )
    )


def exact_attention(q_nope, q_pe, ckv, kpe) -> np.ndarray:
    """One row over its own keys, in order: [heads, latent]."""
    q_nope, q_pe, ckv, kpe = (x.astype(np.float64) for x in (q_nope, q_pe, ckv, kpe))
    scores = (q_nope @ ckv.T + q_pe @ kpe.T) * 0.3
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ ckv


@st.composite
def placements(draw):
    """(devices, table, lengths): any pages for any row, on any device, in any order.

    A row may have a page too few for its next token, or none.
    """
    context = draw(st.sampled_from(CONTEXTS))
    pages = context * 12
    ids = draw(st.permutations(range(pages)))
    table = np.full((BATCH, MAX_PAGES), -1, np.int32)
    lengths = np.zeros(BATCH, np.int32)
    for row in range(BATCH):
        own = draw(st.integers(0, MAX_PAGES))
        table[row, :own] = [ids.pop() for _ in range(own)]
        lengths[row] = draw(st.integers(0, int((table[row] >= 0).sum()) * PAGE))
    return context, table, lengths


@settings(deadline=None, max_examples=60)
@given(placements(), st.integers(0, 2**31))
def test_wherever_the_pages_lie(placement, seed):
    """Decode over pages on any devices is attention over the row's keys in their order."""
    context, table, lengths = placement
    rng = np.random.default_rng(seed)
    num_pages = context * 12
    q_nope, q_pe, new_ckv, new_kpe = (
        rng.standard_normal(shape, np.float32)
        for shape in (
            (BATCH, 1, HEADS, LATENT),
            (BATCH, 1, HEADS, ROPE),
            (BATCH, LATENT),
            (BATCH, ROPE),
        )
    )
    # By id as the table counts them, then where the layout has them: id i on device i % context.
    pools = {width: np.full((num_pages, PAGE, width), np.nan, np.float32) for width in (8, 4)}
    keys = {width: [] for width in pools}
    for width, pool in pools.items():
        for row in range(BATCH):
            mine = rng.standard_normal((lengths[row], width), np.float32)
            for t, key in enumerate(mine):
                pool[table[row, t // PAGE], t % PAGE] = key
            keys[width].append(mine)
    place = np.arange(num_pages) % context * 12 + np.arange(num_pages) // context
    stored = {width: np.empty_like(pool) for width, pool in pools.items()}
    for width, pool in pools.items():
        stored[width][place] = pool

    out, ckv, kpe, new_lengths, held = attend_on(context)(
        *(q_nope, q_pe, stored[LATENT], stored[ROPE], table, lengths, new_ckv, new_kpe)
    )
    capacity = (table >= 0).sum(axis=1) * PAGE
    written = lengths < capacity
    np.testing.assert_array_equal(new_lengths, lengths + written)
    # Every key is counted on exactly one device.
    np.testing.assert_array_equal(np.asarray(held).sum(axis=0), lengths + written)
    for row in range(BATCH):
        news = (new_ckv[row : row + 1], new_kpe[row : row + 1])
        rows = [np.concatenate([keys[w][row], new]) for w, new in zip(pools, news, strict=True)]
        ours = [mine[: lengths[row] + written[row]] for mine in rows]
        got = np.asarray(out)[row, 0]
        if len(ours[0]) == 0:
            assert (got == 0).all()
            continue
        want = exact_attention(q_nope[row, 0], q_pe[row, 0], *ours)
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
        if written[row]:
            at = place[table[row, lengths[row] // PAGE]], lengths[row] % PAGE
            np.testing.assert_array_equal(np.asarray(ckv)[at], new_ckv[row])
            np.testing.assert_array_equal(np.asarray(kpe)[at], new_kpe[row])
    # And nothing else was written.
    changed = ~((np.asarray(ckv) == stored[8]) | np.isnan(np.asarray(ckv))).all(axis=-1)
    assert changed.sum() == written.sum()
