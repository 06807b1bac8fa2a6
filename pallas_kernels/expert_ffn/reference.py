"""The expert feed-forward in plain jnp: sort by expert, grouped products, unsort."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scaled import BlockScaled, scaled_product
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
    gate_up: Float[Array, "experts 2 inter dim"] | BlockScaled,
    down: Float[Array, "experts dim inter"] | BlockScaled,
    shared: tuple[Float[Array, "2 wide dim"] | BlockScaled, Float[Array, "dim wide"] | BlockScaled]
    | None,
    *,
    partial: bool = False,
) -> Float[Array, "tokens dim"]:
    """`expert_ffn`, differentiable unless weights are block-scaled."""
    if isinstance(gate_up, BlockScaled):
        scaled: Any = (gate_up, down, shared)  # all of one kind, as `expert_ffn` has checked
        return _block_scaled(x, expert_ids, weights, *scaled)
    assert not isinstance(down, BlockScaled)
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


def _block_scaled(
    x: Float[Array, "tokens dim"],
    expert_ids: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    gate_up: BlockScaled,
    down: BlockScaled,
    shared: tuple[BlockScaled, BlockScaled] | None,
) -> Float[Array, "tokens dim"]:
    """Every token through one expert after the other, so that one at a time is unpacked."""

    def feed_forward(gate_up: BlockScaled, down: BlockScaled) -> Float[Array, "tokens dim"]:
        gate, up = jnp.moveaxis(scaled_product(x, gate_up), 1, 0)
        return scaled_product((jax.nn.silu(gate) * up).astype(x.dtype), down)

    def add(out: Array, expert: tuple[Int[Array, ""], BlockScaled, BlockScaled]):
        index, *matrices = expert
        chosen = expert_ids == index
        share = jnp.where(chosen, weights, 0).sum(axis=1, keepdims=True)
        y = jnp.where(chosen.any(axis=1, keepdims=True), feed_forward(*matrices) * share, 0)
        return out + y, None

    out = jnp.zeros(x.shape, jnp.float32) if shared is None else feed_forward(*shared)
    index = jnp.arange(gate_up.shape[0], dtype=expert_ids.dtype)
    return lax.scan(add, out, (index, gate_up, down))[0].astype(x.dtype)
