"""How work is cut among the blocks of a launch, computed on the device from traced lengths."""

from pallas_kernels.schedule.split import (
    SplitPlan,
    balanced_share,
    most_segments,
    plan_segments,
)

__all__ = ["SplitPlan", "balanced_share", "most_segments", "plan_segments"]
