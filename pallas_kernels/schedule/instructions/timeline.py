"""When each instruction of a table starts and ends under a cost model."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.schedule.instructions.costs import CostModel
from pallas_kernels.schedule.instructions.quality import steps_of
from pallas_kernels.schedule.instructions.words import FIRST_DEPENDENCY, PARTIAL, Listed


class Event(NamedTuple):
    """An instruction on its processor; `op` is "partial" or "reduction", times are in µs."""

    processor: int
    uid: int
    op: str
    start: float
    end: float


def _ends(
    start: float, inputs: list[int], arrived: dict[int, float], costs: CostModel
) -> float | None:
    """When a reduction ends; None while a dependency has not."""
    time = start + costs.reduction_start
    for uid in inputs:
        if uid not in arrived:
            return None
        time = max(time, arrived[uid] + costs.reduction_latency) + costs.reduction_input
    return time + costs.reduction_writeout + costs.synchronization


def simulate_times(listed: Listed, costs: CostModel) -> tuple[Event, ...]:
    """Every instruction as soon as its processor's queue and its dependencies let it.

    Errors: ValueError where processors wait for each other in a circle.
    """
    queues: dict[int, list[int]] = {}
    for row, processor in enumerate(listed.processor.tolist()):
        queues.setdefault(processor, []).append(row)
    first, last, _ = (array.tolist() for array in listed.keys)
    ops, uids, inputs = listed.op.tolist(), listed.uid.tolist(), listed.inputs.tolist()
    words = listed.words
    free = dict.fromkeys(queues, 0.0)
    ended: dict[int, float] = {}
    events = []
    waiting = {processor: iter(rows) for processor, rows in queues.items()}
    head = {processor: next(rows) for processor, rows in waiting.items()}
    while head:
        moved = False
        for processor in list(head):
            row = head[processor]
            start = free[processor]
            if ops[row] == PARTIAL:
                end = start + costs.partial_time(steps_of(last[row] - first[row]))
            else:
                listed_uids = words[row, FIRST_DEPENDENCY : FIRST_DEPENDENCY + inputs[row]]
                end = _ends(start, listed_uids.tolist(), ended, costs)
            if end is None:
                continue
            moved = True
            ended[uids[row]] = free[processor] = end
            name = "partial" if ops[row] == PARTIAL else "reduction"
            events.append(Event(processor, uids[row], name, start, end))
            head[processor] = next(waiting[processor], -1)
            if head[processor] < 0:
                del head[processor]
        if not moved:
            stuck = ", ".join(str(uids[row]) for row in list(head.values())[:4])
            raise ValueError(f"instructions: uids {stuck} wait for each other in a cycle")
    return tuple(sorted(events, key=lambda event: (event.processor, event.start)))


def makespan(events: tuple[Event, ...]) -> float:
    """When the last instruction ends, in µs."""
    return float(np.max([event.end for event in events]))
