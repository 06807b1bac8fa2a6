"""The expert feed-forward in plain jnp: sort by expert, grouped products, unsort."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.precision import precision_for

# [rows, k] x [experts, n, k] -> [rows, n], rows in groups by expert.
_ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def expert_ffn_reference(
    x: Float[Array, "tokens dim"],
    expert_ids: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    gate_up: Float[Array, "experts 2 inter dim"],
    down: Float[Array, "experts dim inter"],
    shared: tuple[Float[Array, "2 wide dim"], Float[Array, "dim wide"]] | None,
    *,
    partial: bool = False,
) -> Float[Array, "tokens dim"]:
    """`expert_ffn`, differentiable."""
    tokens, active = expert_ids.shape
    experts, _, inter, dim = gate_up.shape
    flat_ids = expert_ids.reshape(-1)
    order = jnp.argsort(flat_ids)
    sizes = jnp.bincount(flat_ids, length=experts).astype(jnp.int32)
    precision = precision_for(x.dtype)

    def grouped_dot(rows: Array, matrices: Array) -> Array:
        return lax.ragged_dot_general(
            rows,
            matrices,
            sizes,
            _ROWS_BY_EXPERT,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def activate(gate: Array, up: Array) -> Array:
        return (jax.nn.silu(gate) * up).astype(x.dtype)

    hidden = grouped_dot(x[order // active], gate_up.reshape(experts, 2 * inter, dim))
    y = grouped_dot(activate(*jnp.split(hidden, 2, axis=-1)), down)
    y = jnp.zeros_like(y).at[order].set(y).reshape(tokens, active, dim)
    if partial:
        y = jnp.where((expert_ids < experts)[..., None], y, 0)
    out = (y * weights[..., None]).sum(axis=1)
    if shared is not None:
        dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        gate, up = dot("td,gid->gti", x, shared[0])
        out = out + dot("ti,di->td", activate(gate, up), shared[1])
    return out.astype(x.dtype)
