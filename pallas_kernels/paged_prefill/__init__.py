"""Prefill attention over a paged latent cache: many query tokens a request, causal."""

from pallas_kernels.paged_prefill.api import BACKENDS, PrefillProblem, paged_prefill

__all__ = ["BACKENDS", "PrefillProblem", "paged_prefill"]
