"""Modules with random weights drawn in NumPy: the initialisers take seconds to compile."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def drawn(make: Callable[[], Module], seed: int) -> Module:
    """make(), its matrices drawn from N(0, 1 / fan_in) and its vectors from U(0.5, 1.5).

    So norms have gains other than 1, and a bias of experts chooses other experts than none.
    """
    rng = np.random.default_rng(seed)
    module = nnx.eval_shape(make)
    state = nnx.state(module)
    for _, variable in nnx.to_flat_state(state):
        shape = variable.shape
        if len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(shape[-1])
        variable.set_value(jnp.asarray(value, variable.dtype))
    nnx.update(module, state)
    return module
