"""How many processors each sequence of a batch gets."""

import heapq
from collections.abc import Sequence

import numpy as np

from pallas_kernels.schedule.instructions.costs import CostModel
from pallas_kernels.schedule.instructions.quality import steps_of
from pallas_kernels.schedule.instructions.tree import best_tree, deal_steps, share_out

FEWEST_KEYS = 128
"""A sequence is cut into pieces of so many keys at least, on average."""


def estimate(processors: int, tokens: int, length: int, costs: CostModel) -> float:
    """How long a sequence takes on so many processors, in µs."""
    if processors == 1:
        return costs.partial_time(steps_of(length))
    tree = best_tree(processors, tokens, length, costs)
    end = share_out(tree, processors, tokens, costs).end
    steps = deal_steps(steps_of(length), end, costs)
    return float(np.max(costs.partial_overhead + costs.partial_step * steps - end))


def split_processors(
    jobs: Sequence[tuple[int, int]], processors: int, costs: CostModel
) -> list[int]:
    """Processors of each job (query tokens, length), at least one, at most `processors` in all.

    In proportion to length; then the fastest job's go to the slowest one, one at a time, while that
    makes the slowest estimate smaller. Processors that help nobody stay idle: so do all but one of
    a job that is faster whole.
    """
    most = [max(min(processors, length // FEWEST_KEYS), 1) for _, length in jobs]
    owned = _in_proportion([length for _, length in jobs], most, processors)
    times = [estimate(count, *job, costs) for count, job in zip(owned, jobs, strict=True)]
    _level(jobs, most, owned, times, processors - sum(owned), costs)
    return [
        1 if costs.partial_time(steps_of(length)) <= time else count
        for count, time, (_, length) in zip(owned, times, jobs, strict=True)
    ]


def _in_proportion(lengths: Sequence[int], most: Sequence[int], processors: int) -> list[int]:
    total = max(sum(lengths), 1)
    owned = [
        min(max(processors * length // total, 1), limit)
        for length, limit in zip(lengths, most, strict=True)
    ]
    while sum(owned) > processors:
        owned[owned.index(max(owned))] -= 1
    return owned


def _level(
    jobs: Sequence[tuple[int, int]],
    most: Sequence[int],
    owned: list[int],
    times: list[float],
    idle: int,
    costs: CostModel,
) -> None:
    """Moves processors to the slowest job, in place, while that helps; idle ones first."""
    while True:
        slowest = max(range(len(jobs)), key=times.__getitem__)
        if owned[slowest] == most[slowest]:
            return
        faster = estimate(owned[slowest] + 1, *jobs[slowest], costs)
        if idle:
            if faster >= times[slowest]:
                return
            idle -= 1
        else:
            donors = [job for job, count in enumerate(owned) if count > 1 and job != slowest]
            if not donors:
                return
            donor = min(donors, key=times.__getitem__)
            slower = estimate(owned[donor] - 1, *jobs[donor], costs)
            if max(faster, slower) >= times[slowest]:
                return
            owned[donor] -= 1
            times[donor] = slower
        owned[slowest] += 1
        times[slowest] = faster


def queue_whole(lengths: Sequence[int], processors: int, costs: CostModel) -> list[list[int]]:
    """Jobs of each processor where there are more jobs than those: the longest go first."""
    free = [(0.0, processor) for processor in range(processors)]
    queues: list[list[int]] = [[] for _ in range(processors)]
    for job in sorted(range(len(lengths)), key=lambda job: -lengths[job]):
        time, processor = free[0]
        queues[processor].append(job)
        heapq.heapreplace(free, (time + costs.partial_time(steps_of(lengths[job])), processor))
    return queues
