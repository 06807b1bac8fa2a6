"""Decode attention over a paged latent cache: a few query tokens a request, many keys."""

from pallas_kernels.paged_decode.api import BACKENDS, paged_decode
from pallas_kernels.paged_decode.tiles import DecodeProblem

__all__ = ["BACKENDS", "DecodeProblem", "paged_decode"]
