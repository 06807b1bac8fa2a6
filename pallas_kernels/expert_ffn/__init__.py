"""Mixture-of-experts feed-forward: each token through the experts chosen for it."""

from pallas_kernels.expert_ffn.api import BACKENDS, expert_ffn
from pallas_kernels.expert_ffn.tiles import ExpertProblem

__all__ = ["BACKENDS", "ExpertProblem", "expert_ffn"]
