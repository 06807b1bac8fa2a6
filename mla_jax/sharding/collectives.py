"""What the devices of a mesh exchange within a step: two sums a layer, and one merge.

Every function here is the identity outside `jax.shard_map`, and where its axis has one part.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax.sharding.mesh import CONTEXT_AXIS, MODEL_AXIS
from pallas_kernels.merge import merge_states


def parts(axis: str) -> int:
    """Over how many devices this code's data are split along `axis`: 1 outside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def part_index(axis: str) -> int | Int[Array, ""]:
    """Which of the `parts` this device has."""
    return lax.axis_index(axis) if parts(axis) > 1 else 0


def sum_over_model(x: Array) -> Array:
    """The sum of a row-parallel product's partial results: one all-reduce."""
    return lax.psum(x, MODEL_AXIS) if parts(MODEL_AXIS) > 1 else x


def once_over_context(lse: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """A log-sum-exp of keys that all context devices have, so that `merge` counts them once."""
    if parts(CONTEXT_AXIS) == 1:
        return lse
    return jnp.where(part_index(CONTEXT_AXIS) == 0, lse, -jnp.inf)


def merge_over_context(
    out: Float[Array, "*rows width"], lse: Float[Array, "*rows"]
) -> Float[Array, "*rows width"]:
    """Attention over all context devices' keys, from the attention over each's: one all-gather.

    out: normalised, of any dtype; lse: base 2, float32. Linear maps of the values may come before
    the merge, so `out` should be as narrow as it gets. A device without keys adds nothing.
    """
    if parts(CONTEXT_AXIS) == 1:
        return out
    # As integers, both fit one message and neither is rounded on its way.
    bits = jnp.dtype(f"uint{8 * out.dtype.itemsize}")
    lse_bits = lax.bitcast_convert_type(lse, bits).reshape(*lse.shape, -1)
    message = jnp.concatenate([lax.bitcast_convert_type(out, bits), lse_bits], axis=-1)
    messages = lax.all_gather(message, CONTEXT_AXIS)

    width, words = out.shape[-1], lse_bits.shape[-1]
    outs = lax.bitcast_convert_type(messages[..., :width], out.dtype)
    packed = messages[..., width:] if words > 1 else messages[..., width]
    lses = lax.bitcast_convert_type(packed, jnp.float32)
    states = list(zip(outs.astype(jnp.float32), lses, strict=True))
    merged, _ = functools.reduce(lambda a, b: merge_states(*a, *b), states)
    return merged.astype(out.dtype)
