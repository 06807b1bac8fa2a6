"""Decode attention as an instruction table says: partials of sequences, and trees over them."""

from pallas_kernels.megakernel.api import BACKENDS, decode_by_schedule

__all__ = ["BACKENDS", "decode_by_schedule"]
