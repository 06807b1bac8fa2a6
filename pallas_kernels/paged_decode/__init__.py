"""Decode attention over a paged latent cache: a few query tokens a request, many keys."""

from pallas_kernels.paged_decode.api import BACKENDS, paged_decode

__all__ = ["BACKENDS", "paged_decode"]
