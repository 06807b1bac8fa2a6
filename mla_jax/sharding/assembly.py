"""An array that is put together on the devices of a mesh, from pieces that arrive one by one."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, DTypeLike

from mla_jax.sharding.mesh import Device

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) along each axis."""


@partial(jax.jit, donate_argnames="stack")
def _filled(stack: Array, part: Array, slot: tuple[int | Array, ...]) -> Array:
    """`stack`, donated, with `part` at stack[slot]."""
    start = (*slot, *(0 for _ in part.shape))
    return lax.dynamic_update_slice(stack, part[(None,) * len(slot)], start)


class ShardedBuffer:
    """Every device of this process has its own part of the array, and is given nothing else.

    sharding None is the default device. A piece is what lies at array[slot], or a range of it.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None
    ) -> None:
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        whole = {None: (slice(None),) * len(shape)}
        indices = whole if sharding is None else sharding.addressable_devices_indices_map(shape)
        self._bounds: dict[Device | None, Bounds] = {}
        for device, index in indices.items():
            assert index is not None  # of an addressable device
            slices = zip(index, shape, strict=True)
            self._bounds[device] = tuple(part.indices(size)[:2] for part, size in slices)
        self._parts: dict[Device | None, Array] = {}

    def fill(self, slot: tuple[int, ...], piece: Callable[[Bounds, Device | None], Array]) -> None:
        """Put piece(bounds, device) at array[slot] on each device that has some of it."""
        depth = len(slot)
        for device, bounds in self._bounds.items():
            ours, wanted = bounds[:depth], bounds[depth:]
            if not all(start <= at < stop for at, (start, stop) in zip(slot, ours, strict=True)):
                continue
            value = piece(wanted, device)
            if slot:
                stack = self._parts.pop(device, None)
                if stack is None:
                    shape = tuple(stop - start for start, stop in bounds)
                    stack = jnp.zeros(shape, self.dtype, device=device)
                local = tuple(at - start for at, (start, _) in zip(slot, ours, strict=True))
                value = _filled(stack, value, local)
            self._parts[device] = value

    def array(self) -> Array:
        """The whole, once all of it is filled."""
        if self.sharding is None:
            return self._parts[None]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, list(self._parts.values())
        )
