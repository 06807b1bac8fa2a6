"""Decode attention as an instruction table says: partials of sequences, and trees over them."""

from pallas_kernels.megakernel.api import BACKENDS, decode_by_schedule
from pallas_kernels.megakernel.signals import check_signals, make_signals

__all__ = ["BACKENDS", "check_signals", "decode_by_schedule", "make_signals"]
