"""Attention of whole prompts that skips the blocks of keys which a layout leaves out."""

from pallas_kernels.sparse_prefill.api import BACKENDS, sparse_prefill
from pallas_kernels.sparse_prefill.tiles import SparseProblem

__all__ = ["BACKENDS", "SparseProblem", "sparse_prefill"]
