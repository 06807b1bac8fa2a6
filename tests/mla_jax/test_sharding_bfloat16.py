"""bfloat16 on a mesh: logits as near to one device's as these are to the exact ones.

A mesh adds in another order, and rounds the partial sums. In bfloat16 that moves logits as any
other order would: each of some ten roundings a layer errs by up to half a unit, 2^-9 of its number,
and independent errors add as squares. UNITS bounds the distance of a row's logits, as a share of
their length, in units of 2^-8; a wrong sum is hundreds of them away.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshed import ALL_CHOSEN, BATCH, UNIT, UNITS, label, logits_on, mesh_of, units
from oracles import QUICK_COMPILE, float64

from mla_jax import Decoder, generate

PROMPT, STEPS = 11, 4
ALL = ALL_CHOSEN.replace_dtype("bfloat16")


def exact_twin(model: Decoder) -> Decoder:
    """The same weights, computing in float32."""
    twin = nnx.eval_shape(lambda: Decoder(model.config.replace_dtype("float32"), rngs=nnx.Rngs(0)))
    arrays = [array.astype(jnp.float32) for array in jax.tree.leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(twin), arrays)


@pytest.fixture(scope="module")
def alone():
    """(model, tokens, one device's logits, the exact ones) of a seed, computed once."""
    made = {}

    def of(seed, rng):
        if seed not in made:
            model = Decoder(ALL, rngs=nnx.Rngs(seed))
            tokens = rng.integers(0, ALL.vocab, (BATCH, PROMPT + STEPS)).astype(np.int32)
            whole = jax.jit(exact_twin(model), compiler_options=QUICK_COMPILE)
            exact = float64(whole(tokens))[:, PROMPT - 1 :].swapaxes(0, 1)
            made[seed] = model, tokens, logits_on(None, model, tokens, prompt=PROMPT), exact
        return made[seed]

    return of


@pytest.mark.parametrize("shape", [{"data": 2, "model": 4}, {"model": 2, "context": 4}], ids=label)
def test_logits(seed, rng, alone, shape):
    model, tokens, one, exact = alone(seed, rng)
    got = logits_on(mesh_of(shape), model, tokens, prompt=PROMPT)
    distance = units(got, one)
    assert distance.mean() < UNITS["mean"]
    assert distance.max() < UNITS["max"]
    # A mesh is no further from the exact logits than one device is.
    assert units(got, exact).mean() < 1.25 * units(one, exact).mean()


def test_greedy_tokens_are_best_but_for_ties(seed, rng):
    """Each is, by the exact logits after the same text, the best one or nearly tied with it."""
    model = Decoder(dataclasses.replace(ALL, n_layers=1, n_dense=0), rngs=nnx.Rngs(seed))
    prompts = rng.integers(0, ALL.vocab, (4, 5))
    mesh = mesh_of({"data": 2, "model": 4})
    made = generate(model, prompts.tolist(), max_new_tokens=12, page_size=16, mesh=mesh)
    text = np.concatenate([prompts, np.array(made)], axis=1).astype(np.int32)
    whole = jax.jit(exact_twin(model), compiler_options=QUICK_COMPILE)
    logits = float64(whole(text))[:, 4:-1]
    chosen = np.take_along_axis(logits, text[:, 5:, None], axis=-1)[..., 0]
    # Four deviations of the difference of two logits.
    bound = 4 * 2**0.5 * UNITS["max"] * UNIT * logits.std()
    assert (logits.max(axis=-1) - chosen < bound).all()
    # Another token would hardly be: the bound is not above what it bounds.
    assert (np.sort(logits, axis=-1)[..., -5] < logits.max(axis=-1) - bound).mean() > 0.5
