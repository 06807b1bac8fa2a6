"""Arithmetic of plans: prefix sums, selections and sorts of small arrays, as few launches.

A plan's arrays hold hundreds of numbers. XLA makes several launches of a sort, a cumulative sum or
a nonzero on a GPU, each of which costs more than comparing all numbers with each other, in one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

COMPARED = 1024
"""Up to so many numbers are compared with each other; more go XLA's way."""


def ceil_div(a: Array, b: Array | int) -> Array:
    """a / b, rounded up, of int32."""
    return (a + b - 1) // b


def sum_before(amounts: Int[Array, "*axes n"]) -> Int[Array, "*axes n"]:
    """Along the last axis, the sum of the amounts before each."""
    number = amounts.shape[-1]
    if number > COMPARED:
        return jnp.cumsum(amounts, axis=-1, dtype=jnp.int32) - amounts
    index = jnp.arange(number, dtype=jnp.int32)
    before = jnp.where(index < index[:, None], amounts[..., None, :], 0)
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def positions(chosen: Bool[Array, " n"], size: int) -> Int[Array, " size"]:
    """Where `chosen` is true, in order: the first `size` places, then n for each one wanting."""
    number = chosen.shape[0]
    if number > COMPARED:
        [found] = jnp.nonzero(chosen, size=size, fill_value=number)
        return found.astype(jnp.int32)
    place = jnp.where(chosen, sum_before(chosen.astype(jnp.int32)), -1)
    hit = place == jnp.arange(size, dtype=jnp.int32)[:, None]
    index = jnp.arange(number, dtype=jnp.int32)
    return number - jnp.sum(jnp.where(hit, number - index, 0), axis=1, dtype=jnp.int32)


def sorted_by(
    key: Int[Array, " n"], arrays: tuple[Int[Array, " n"], ...]
) -> tuple[Int[Array, " n"], ...]:
    """`arrays` in the order of rising keys; equal keys stay in theirs."""
    number = key.shape[0]
    if number > COMPARED:
        order = jnp.argsort(key, stable=True)
        return tuple(array[order] for array in arrays)
    index = jnp.arange(number, dtype=jnp.int32)
    before = (key < key[:, None]) | ((key == key[:, None]) & (index < index[:, None]))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    hit = place == index[:, None]
    stacked = jnp.where(hit, jnp.stack(arrays)[:, None], 0)
    return tuple(jnp.sum(stacked, axis=-1, dtype=jnp.int32))
