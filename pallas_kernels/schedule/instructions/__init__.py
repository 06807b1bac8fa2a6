"""Instruction schedules of the decode megakernel: made, checked and timed on the host."""

from pallas_kernels.schedule.instructions.backward import schedule
from pallas_kernels.schedule.instructions.costs import CostModel
from pallas_kernels.schedule.instructions.quality import get_quality
from pallas_kernels.schedule.instructions.table import Schedule
from pallas_kernels.schedule.instructions.timeline import Event

__all__ = ["CostModel", "Event", "Schedule", "get_quality", "schedule"]
