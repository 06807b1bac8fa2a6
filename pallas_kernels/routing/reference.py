"""Expert routing in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.routing.tiles import RoutingRule


def _in_best_groups(choice: Float[Array, "tokens experts"], rule: RoutingRule) -> Array:
    """`choice` with -inf outside the eligible groups."""
    if rule.limited_groups == rule.groups:
        return choice
    grouped = choice.reshape(choice.shape[0], rule.groups, -1)
    best = lax.top_k(grouped, rule.best_of_group)[0].sum(axis=-1)
    _, groups = lax.top_k(best, rule.limited_groups)
    eligible = (groups[:, :, None] == jnp.arange(rule.groups)).any(axis=1)
    return jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(choice.shape)


def route_reference(
    logits: Float[Array, "tokens experts"], bias: Float[Array, " experts"] | None, rule: RoutingRule
) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"]]:
    """`route`, differentiable in the weights."""
    scores = jax.nn.softmax(logits, axis=-1) if rule.score == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    _, ids = lax.top_k(_in_best_groups(choice, rule), rule.active)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if rule.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return ids.astype(jnp.int32), weights * rule.scale
