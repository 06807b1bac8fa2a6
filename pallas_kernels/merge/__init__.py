"""Log-sum-exp merge of attention over disjoint sets of keys."""

from pallas_kernels.merge.reference import merge_partials
from pallas_kernels.merge.triton import merge_partials_triton

__all__ = ["merge_partials", "merge_partials_triton"]
