"""`mla_jax.megakernel`: the public functions, what they refuse, and decoding in a loop."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_within
from scheduled import SCALE, dense, make_scheduled

from mla_jax import megakernel

CLOSE = {0.99: 2e-6, 1.0: 1e-5}
LENGTHS, TOKENS = [700, 40], 2
DECODE = {16: megakernel.mla_decode, 8: megakernel.mla_decode_8_heads}


@pytest.mark.parametrize("heads", [16, 8])
def test_against_dense(rng, heads):
    case = make_scheduled(rng, LENGTHS, TOKENS, heads)
    plan = megakernel.schedule(LENGTHS, TOKENS, 8, heads)
    out = DECODE[heads](plan, *case.args, scale=SCALE)
    assert_within(out, dense(case, LENGTHS), CLOSE)


def test_schedule_of_another_number_of_heads():
    for heads, other in ((16, 8), (8, 16)):
        plan = megakernel.schedule([300], 1, 2, heads)
        text = (
            f"schedule: got one for {heads} heads, expected {other}: use {DECODE[heads].__name__}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            DECODE[other](*(plan, *[jnp.zeros(1)] * 5), scale=SCALE)


def test_one_plan_for_a_loop(rng):
    """Lengths grow in a scan; the plan, made with room, and its compilation stay."""
    final = [260, 70]
    case = make_scheduled(rng, final, 1)
    plan = megakernel.schedule([300, 100], 1, 6)
    lengths = jnp.asarray([[256, 66], [257, 67], [260, 70]], jnp.int32)

    @jax.jit
    def loop(plan, lengths, *args):
        def step(total, length):
            out = megakernel.mla_decode(plan, *args, scale=SCALE, lengths=length)
            return total + length.sum(), out

        return jax.lax.scan(step, jnp.int32(0), lengths)[1]

    for length, out in zip(lengths.tolist(), loop(plan, lengths, *case.args), strict=True):
        assert_within(out, dense(case, length), CLOSE)


def refusals() -> dict[str, tuple[type, dict]]:
    return {
        "q_rot: got shape (2, 2, 16, 32), expected (2, 2, 16, 64), [batch, new_tokens, heads, 64] "
        "of the schedule": (ValueError, {"q_rot": jnp.zeros((2, 2, 16, 32))}),
        "q_v: got shape (2, 1, 16, 512), expected (2, 2, 16, 512), [batch, new_tokens, heads, 512]"
        " of the schedule": (ValueError, {"q_v": jnp.zeros((2, 1, 16, 512))}),
        "k_rot: got shape (6, 64, 64), expected (6, 256, 64), [pages, 256, 64], v's pages": (
            ValueError,
            {"k_rot": jnp.zeros((6, 64, 64))},
        ),
        "v: got no page, expected at least one": (
            ValueError,
            {"k_rot": jnp.zeros((0, 256, 64)), "v": jnp.zeros((0, 256, 512))},
        ),
        "k_rot: got dtype bfloat16, expected float32, q_v's": (
            TypeError,
            {"k_rot": jnp.zeros((6, 256, 64), jnp.bfloat16)},
        ),
        "table: got shape (3, 4), expected [2, max_pages]": (
            ValueError,
            {"table": jnp.zeros((3, 4), jnp.int32)},
        ),
        "table: got dtype float32, expected int32": (TypeError, {"table": jnp.zeros((2, 4))}),
        "table: got 2 pages a sequence, expected 3 for 700 keys": (
            ValueError,
            {"table": jnp.zeros((2, 2), jnp.int32)},
        ),
        "table: got pages 0 to 6, expected 0 to 5": (
            ValueError,
            {"table": jnp.asarray([[0, 6, 1], [2, 0, 0]], jnp.int32)},
        ),
        "table: got pages -1 to 3, expected 0 to 5": (
            ValueError,
            {"table": jnp.asarray([[0, 3, 1], [-1, 0, 0]], jnp.int32)},
        ),
        "lengths: got 701 for sequence 0, expected 0 to 700, for which the schedule was made: make "
        "one for longer sequences": (ValueError, {"lengths": jnp.asarray([701, 40], jnp.int32)}),
        "lengths: got shape (1,), expected (2,)": (
            ValueError,
            {"lengths": jnp.zeros(1, jnp.int32)},
        ),
        "lengths: got dtype float32, expected int32": (TypeError, {"lengths": jnp.zeros(2)}),
        "backend: got 'cuda', expected": (ValueError, {"backend": "cuda"}),
        "backend 'mosaic_gpu' has no mla_decode: it has megakernel, triton, reference": (
            NotImplementedError,
            {"backend": "mosaic_gpu"},
        ),
        "queue: got 'mine', expected one of processors, global": (ValueError, {"queue": "mine"}),
    }


@pytest.mark.parametrize("text", refusals())
def test_refusals(rng, text):
    error, change = refusals()[text]
    case = make_scheduled(rng, LENGTHS, TOKENS, num_pages=6)
    plan = megakernel.schedule(LENGTHS, TOKENS, 8)
    options = {key: change.pop(key) for key in ("lengths", "backend", "queue") if key in change}
    changed = dataclasses.replace(case, **change)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        megakernel.mla_decode(plan, *changed.args, scale=SCALE, **options)


def test_pages_that_lengths_do_not_reach_may_be_anything(rng):
    """A plan with room asks for the pages of the present lengths alone."""
    case = make_scheduled(rng, [200, 40], TOKENS)
    plan = megakernel.schedule([2000, 400], TOKENS, 8)
    lengths = jnp.asarray([200, 40], jnp.int32)
    out = megakernel.mla_decode(plan, *case.args, scale=SCALE, lengths=lengths)
    assert_within(out, dense(case, [200, 40]), CLOSE)
    assert np.asarray(case.table).shape[1] * 256 < 2000
