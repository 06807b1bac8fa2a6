"""Log-sum-exp merge of attention over disjoint sets of keys."""

from pallas_kernels.merge.reference import merge_states

__all__ = ["merge_states"]
