"""Programs on meshes: compiled side by side, given random data on the devices, and timed."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from mla_jax.sharding.layout import spec

AnyMesh = Mesh | AbstractMesh
MIXERS = (0x7FEB352D, 0x846CA68B, 1)
"""Two rounds of multiplication between three of xor-shift: each bit depends on all of the input."""


def struct(mesh: AnyMesh, shape: Sequence[int], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    """An array to be, which `axes` split over the mesh."""
    place = NamedSharding(mesh, spec(mesh, *axes))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)


def on_parts(part: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """part(x, state, rest) -> (x, state), run on each device's parts of `args`, as they lie."""
    specs = jax.tree.map(lambda array: array.sharding.spec, args)
    return jax.shard_map(part, in_specs=specs, out_specs=specs[:2], check_vma=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """function(x, state, rest) -> (result, state) over whole arrays; the state is donated.

    args: x, state and rest as structs with their places on `mesh`.
    """

    mesh: AnyMesh
    function: Callable[..., Any]
    args: tuple[Any, Any, Any]

    def compile(self) -> Callable[..., Any]:
        with jax.set_mesh(self.mesh):  # pyright: ignore[reportArgumentType]
            return jax.jit(self.function, donate_argnums=1).lower(*self.args).compile()


def compile_all(programs: Sequence[Program]) -> list[Callable[..., Any]]:
    """Every program compiled, side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(Program.compile, programs))


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Callable[..., Array]:
    def make(seed: Array, scale: Array) -> Array:
        x = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            x = x * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
        for factor in MIXERS:
            x = (x ^ (x >> 16)) * jnp.uint32(factor) + seed
        even = (x >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
        return (even * (12**0.5 * scale)).astype(dtype)

    return jax.jit(make, out_shardings=place)


def random_arrays(
    tree: Any, seed: int, scale: Callable[[tuple[int, ...]], float] = lambda shape: 1.0
) -> Any:
    """Arrays for a tree of structs, made on their devices: uniform, mean 0, deviation scale(shape).

    A hash of seed and place: the same on every mesh, and compiled in a tenth of jax.random's time.
    """
    leaves, structure = jax.tree.flatten(tree)
    seeds = np.random.default_rng(seed).integers(0, 2**32, len(leaves), np.uint32)
    arrays = [
        _maker(leaf.shape, leaf.dtype, leaf.sharding)(one, np.float32(scale(leaf.shape)))
        for leaf, one in zip(leaves, seeds, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def random_weights(tree: Any, seed: int) -> Any:
    """Arrays for a module's structs: deviation fan_in^-1/2, and ones where there is one axis."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = random_arrays(leaves, seed, lambda shape: shape[-1] ** -0.5)
    ones = [
        jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding) if len(leaf.shape) == 1 else array
        for leaf, array in zip(leaves, drawn, strict=True)
    ]
    return jax.tree.unflatten(structure, ones)


class Runs:
    """A compiled program and its arrays: what a run leaves as its state, the next one takes."""

    def __init__(self, compiled: Callable[..., Any], x: Any, state: Any, rest: Any) -> None:
        self.compiled, self.x, self.state, self.rest = compiled, x, state, rest
        self.result: Any = None

    def burst(self, runs: int) -> None:
        """Queue that many runs, then wait until they are done."""
        for _ in range(runs):
            self.result, self.state = self.compiled(self.x, self.state, self.rest)
        jax.block_until_ready((self.result, self.state))
