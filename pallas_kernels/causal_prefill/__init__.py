"""Attention of ragged new tokens in MLA's expanded form: every head has keys of its own."""

from pallas_kernels.causal_prefill.api import BACKENDS, causal_prefill
from pallas_kernels.causal_prefill.tiles import CausalProblem

__all__ = ["BACKENDS", "CausalProblem", "causal_prefill"]
