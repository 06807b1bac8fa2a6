"""Decode over paged keys and values of their own, a group of query heads to each of them."""

from pallas_kernels.grouped_decode.api import BACKENDS, grouped_decode
from pallas_kernels.grouped_decode.reference import grouped_decode_reference

__all__ = ["BACKENDS", "grouped_decode", "grouped_decode_reference"]
