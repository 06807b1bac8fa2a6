"""How work is cut among the blocks of a launch, computed on the device from traced lengths."""

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
    "SplitPlan",
    "WorkerPlan",
    "balanced_share",
    "most_segments",
    "most_worker_segments",
    "plan_segments",
    "plan_workers",
    "spread",
]
