"""The sampler against exact distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.sampling import Sampler

VOCAB, DRAWS = 8, 4096


def frequencies(sampler: Sampler, logits: np.ndarray, seed: int) -> np.ndarray:
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1))
    tokens = jax.jit(sampler)(rows, jax.random.key(seed))
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / DRAWS


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def test_greedy_takes_the_largest_of_each_row(rng, seed):
    logits = rng.standard_normal((5, VOCAB)).astype(np.float32)
    tokens = Sampler()(jnp.asarray(logits), jax.random.key(seed))
    np.testing.assert_array_equal(np.asarray(tokens), logits.argmax(axis=-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(rng, seed, temperature):
    logits = rng.standard_normal(VOCAB)
    got = frequencies(Sampler(temperature=temperature), logits, seed)
    # Six standard deviations of a frequency among DRAWS.
    assert np.abs(got - softmax(logits / temperature)).max() < 6 * 0.5 / np.sqrt(DRAWS)


def test_top_k_keeps_k(rng, seed):
    logits = rng.permutation(VOCAB) / 4.0
    kept = np.argsort(-logits)[:3]
    got = frequencies(Sampler(temperature=1.0, top_k=3), logits, seed)
    assert set(np.flatnonzero(got)) == set(kept)
    want = softmax(np.where(np.isin(np.arange(VOCAB), kept), logits, -np.inf))
    assert np.abs(got - want).max() < 6 * 0.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.45, 2), (0.79, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(seed, top_p, kept):
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.full(VOCAB, -np.inf)
    logits[[5, 1, 6, 2]] = np.log(probs)
    got = frequencies(Sampler(temperature=1.0, top_p=top_p), logits, seed)
    assert list(np.flatnonzero(got)) == sorted([5, 1, 6, 2][:kept])


def test_same_key_same_tokens(rng, seed):
    logits = jnp.asarray(rng.standard_normal((16, VOCAB)), jnp.float32)
    sampler = Sampler(temperature=1.0)
    first, again = (sampler(logits, jax.random.key(seed)) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: got nan, expected 0 or more"),
        ({"top_k": 0}, "top_k: got 0, expected at least 1"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p: got 1.5, expected more than 0 and at most 1"),
    ],
)
def test_refusals(argument, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampler(**argument)
