"""`mla_paged_decode`: CSR paging against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_within, softmax_sum

from mla_jax import mla_paged_decode

PAGE, LATENT, ROPE, HEADS = 16, 32, 16, 4


def requests(rng, pages_of, tokens=()):
    """(arguments of a call over a pool with NaN in unused pages, its pages a request)."""
    num_pages = sum(pages_of) + 2
    order = rng.permutation(num_pages)
    used, unused = order[: sum(pages_of)], order[sum(pages_of) :]
    ckv = rng.standard_normal((num_pages, PAGE, LATENT)).astype(np.float32)
    kpe = rng.standard_normal((num_pages, PAGE, ROPE)).astype(np.float32)
    ckv[unused], kpe[unused] = np.nan, np.nan
    q = [
        rng.standard_normal((len(pages_of), *tokens, HEADS, n)).astype(np.float32)
        for n in (LATENT, ROPE)
    ]
    indptr = np.cumsum([0, *pages_of]).astype(np.int32)
    indices = np.concatenate([used, [-9, 10**6]]).astype(np.int32)  # the tail is garbage
    return [jnp.asarray(a) for a in (*q, ckv, kpe, indptr, indices)]


def oracle(args, last, scale):
    """Every request alone, from the contract."""
    q_nope, q_pe, ckv, kpe, indptr, indices = (np.asarray(a, np.float64) for a in args)
    tokens = q_nope.ndim == 4
    out, lse = np.zeros(q_nope.shape), np.full(q_nope.shape[:-1], -np.inf)
    for b in range(q_nope.shape[0]):
        pages = indices[int(indptr[b]) : int(indptr[b + 1])].astype(int)
        length = len(pages) * PAGE if last is None else (len(pages) - 1) * PAGE + last[b]
        if len(pages) == 0:
            continue
        keys = ckv[pages].reshape(-1, LATENT)[:length]
        rope = kpe[pages].reshape(-1, ROPE)[:length]
        count = q_nope.shape[1] if tokens else 1
        for i in range(count):
            at = (b, i) if tokens else (b,)
            seen = length - count + i + 1
            if seen > 0:
                scores = (q_nope[at] @ keys[:seen].T + q_pe[at] @ rope[:seen].T) * scale
                out[at], lse[at] = softmax_sum(scores, keys[:seen])
    return out, lse


@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("with_last", [False, True])
def test_against_the_oracle(rng, tokens, with_last):
    pages_of = [2, 0, 1, 3]
    args = requests(rng, pages_of, tokens)
    last = rng.integers(1, PAGE + 1, len(pages_of)) if with_last else None
    traced = None if last is None else jnp.asarray(last, jnp.int32)
    call = jax.jit(lambda args, last: mla_paged_decode(*args, sm_scale=0.2, kv_last_page_len=last))
    out, lse = call(args, traced)
    want_out, want_lse = oracle(args, last, 0.2)
    assert_within(out, want_out, {1.0: 1e-5})
    assert_within(lse, want_lse, {1.0: 1e-5})


def test_the_default_scale_is_of_a_head_before_absorption(rng):
    shapes = (1, 2, 512), (1, 2, 64), (2, PAGE, 512), (2, PAGE, 64)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    args = [*arrays, jnp.array([0, 2]), jnp.array([1, 0])]
    default, _ = mla_paged_decode(*args)
    named, _ = mla_paged_decode(*args, sm_scale=192**-0.5)
    np.testing.assert_array_equal(np.asarray(default), np.asarray(named))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: jnp.array([0])}, "kv_indices: got 1 ids, expected kv_indptr's 3"),
        ({4: jnp.array([0, 2, 1])}, r"kv_indptr: got \[0, 2, 1\], expected 0 and then no"),
        ({4: jnp.array([0, 3])}, r"kv_indptr: got shape \(2,\), expected \(3,\)"),
        ({5: jnp.array([0, 1, 99])}, "kv_indices: got ids from 0 to 99, expected 0 to 4"),
        ({6: None}, "sm_scale: got None for latent 32 and rope 16"),
        ({1: jnp.ones((2, HEADS))}, "q_nope, q_pe: got shapes"),
    ],
)
def test_refusals(rng, change, message):
    args = [*requests(rng, [1, 2]), 0.1]
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=rf"^{message}"):
        mla_paged_decode(*args)


def test_a_last_page_cannot_hold_more_than_a_page(rng):
    with pytest.raises(ValueError, match=r"^kv_last_page_len: got 1 to 17, expected 1 to 16$"):
        mla_paged_decode(*requests(rng, [1, 2]), sm_scale=0.1, kv_last_page_len=jnp.array([1, 17]))
