"""Choosing experts: scores to the ids and weights of each token's experts."""

from pallas_kernels.routing.api import BACKENDS, RoutingProblem, route
from pallas_kernels.routing.tiles import RoutingRule

__all__ = ["BACKENDS", "RoutingProblem", "RoutingRule", "route"]
