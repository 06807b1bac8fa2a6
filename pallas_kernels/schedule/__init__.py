"""How work is cut among the blocks of a launch.

Plans of segments are computed on the device from traced lengths, the instruction schedules of the
megakernel on the host.
"""

from pallas_kernels.schedule.instructions import CostModel, Schedule, get_quality, schedule
from pallas_kernels.schedule.split import (
    SplitPlan,
    balanced_share,
    most_segments,
    plan_segments,
)
from pallas_kernels.schedule.workers import (
    WorkerPlan,
    most_worker_segments,
    plan_workers,
    spread,
)

__all__ = [
    "CostModel",
    "Schedule",
    "SplitPlan",
    "WorkerPlan",
    "balanced_share",
    "get_quality",
    "most_segments",
    "most_worker_segments",
    "plan_segments",
    "plan_workers",
    "schedule",
    "spread",
]
