"""What the instructions of the decode megakernel cost: the model that its schedules follow."""

import dataclasses
import math

from pallas_kernels.device import Device
from pallas_kernels.tuning import tuned


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """Times in microseconds; the defaults are readings from an H100, the original kernel's.

    A reduction's input can be used `reduction_latency` after its producer ended. Its result is
    there `reduction_writeout` and `synchronization` after its last input.
    """

    partial_start: float = 3.0
    partial_step: float = 1.49
    """For every 32 keys."""
    partial_writeout: float = 4.5
    reduction_start: float = 4.0
    reduction_start_in_quality: float = 2.0
    """The smaller one with which `get_quality` compares trees."""
    reduction_input: float = 0.4
    reduction_latency: float = 1.0
    reduction_writeout: float = 1.0
    synchronization: float = 0.5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, expected a time in µs of at least 0")
        for name in ("partial_step", "reduction_input"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: got 0, expected a time in µs above 0")

    @property
    def partial_overhead(self) -> float:
        """What a partial costs besides its steps."""
        return self.partial_start + self.partial_writeout

    @property
    def reduction_tail(self) -> float:
        """From the end of a reduction's last producer to its own end, without inputs' times."""
        return self.reduction_latency + self.reduction_writeout + self.synchronization

    def partial_time(self, steps: int) -> float:
        """How long a partial of so many steps takes."""
        return self.partial_overhead + self.partial_step * steps


DEFAULT_COSTS = CostModel()


def device_costs(device: Device, rows: int) -> CostModel:
    """Those that `mla-jax tune megakernel` measured on `device` for partials of so many query rows
    (tokens times heads); the default where nobody has."""
    found = tuned("megakernel_costs", device, "costs", rows=rows)
    return CostModel(**found) if found else DEFAULT_COSTS
