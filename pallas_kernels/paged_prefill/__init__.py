"""Prefill attention over a paged latent cache: any number of query tokens a request, causal."""

from pallas_kernels.paged_prefill.api import BACKENDS, paged_prefill

__all__ = ["BACKENDS", "paged_prefill"]
