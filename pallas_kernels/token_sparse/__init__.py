"""Latent attention in which every query has its own list of single cached tokens."""

from pallas_kernels.token_sparse.api import BACKENDS, token_sparse

__all__ = ["BACKENDS", "token_sparse"]
