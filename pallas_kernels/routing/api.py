"""The one entry of expert routing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.routing import triton
from pallas_kernels.routing.reference import route_reference
from pallas_kernels.routing.tiles import RoutingProblem, RoutingRule

# Fastest first.
BACKENDS = (
    Backend(name="triton", run=triton.route_triton, unfit=needs_gpu),
    Backend(name="reference", run=lambda *args, interpret: route_reference(*args)),
)


def route(
    logits: Float[Array, "tokens experts"],
    bias: Float[Array, " experts"] | None,
    rule: RoutingRule,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"]]:
    """(expert ids int32, weights float32) of each token's experts, best first, by `rule`.

    logits and bias are float32; equal scores go to the lower id. The reference is differentiable
    in the weights. Errors: ValueError (shape), TypeError (dtype), NotImplementedError (backend).
    """
    tokens, experts = logits.shape
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias: got shape {bias.shape}, expected {(experts,)}")
    if experts % rule.groups:
        raise ValueError(f"rule: got {rule.groups} groups, expected a divisor of {experts} experts")
    eligible = experts // rule.groups * rule.limited_groups
    if not 1 <= rule.active <= eligible:
        raise ValueError(f"rule: got {rule.active} active, expected 1 to the {eligible} eligible")
    for name, array in (("logits", logits), ("bias", bias)):
        if array is not None and array.dtype != jnp.float32:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected float32")
    problem = RoutingProblem(tokens=tokens, experts=experts, rule=rule)
    chosen = choose("route", BACKENDS, problem, backend)
    return chosen.run(logits, bias, rule, interpret=interpret)
