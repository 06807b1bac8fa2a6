"""The backward scheduler: instruction tables for a batch of sequences of any lengths."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.device import current_device
from pallas_kernels.schedule.instructions.costs import CostModel, device_costs
from pallas_kernels.schedule.instructions.processors import queue_whole, split_processors
from pallas_kernels.schedule.instructions.quality import STEP, steps_of
from pallas_kernels.schedule.instructions.table import Schedule, pack_queues
from pallas_kernels.schedule.instructions.tree import best_tree, deal_steps, share_out
from pallas_kernels.schedule.instructions.words import PARTIAL, QUERY_TOKENS, REDUCTION

PROCESSORS = 132
"""Those of an H100 or H200, where the device does not say."""
FIRST_REDUCTION = 132
"""The least uid of a reduction."""

Queue = list[list[int]]


class _Job(NamedTuple):
    """A sequence, and up to four of its query tokens, from q_seq on."""

    batch: int
    q_seq: int
    tokens: int
    length: int

    def partial(self, uid: int, start: int, end: int, *, whole: bool = False) -> list[int]:
        row = self.batch if whole else -uid - 1
        return [PARTIAL, uid, row, self.q_seq, self.batch, self.q_seq, start, end, self.length]


def _schedule_whole(jobs: Sequence[_Job], processors: int, costs: CostModel) -> list[Queue]:
    """One partial for each job; processors take several."""
    numbers = queue_whole([job.length for job in jobs], processors, costs)
    uids = itertools.count()
    return [
        [jobs[i].partial(next(uids), 0, jobs[i].length, whole=True) for i in queue]
        for queue in numbers
    ]


def _schedule_split(
    job: _Job, processors: int, costs: CostModel, first_uid: int, uids: Iterator[int]
) -> list[Queue]:
    """The queues of the processors that share a job."""
    if processors == 1:
        return [[job.partial(first_uid, 0, job.length, whole=True)]]
    tree = best_tree(processors, job.tokens, job.length, costs)
    shares = share_out(tree, processors, job.tokens, costs)
    ends = deal_steps(steps_of(job.length), shares.end, costs).cumsum() * STEP
    ends = ends.clip(max=job.length).tolist()
    queues: list[Queue] = [
        [job.partial(first_uid + i, start, end)]
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    names = [[next(uids) for _ in range(job.tokens)] for _ in tree.parent]
    places = itertools.product(tree.by_due(), range(job.tokens))
    held = sorted(
        zip(places, shares.holders.tolist(), strict=True),
        key=lambda item: (tree.finish[item[0][0]], -item[0][0]),
    )
    for (reduction, token), processor in held:
        inputs = [names[i][token] for i, parent in enumerate(tree.parent) if parent == reduction]
        inputs += [
            first_uid + i for i, to in enumerate(shares.of_reduction.tolist()) if to == reduction
        ]
        uid = names[reduction][token]
        row = job.batch if reduction == 0 else -uid - 1
        # The last that was dealt is due first.
        deps = inputs[::-1]
        words = [REDUCTION, uid, len(deps) - 1, row, job.q_seq + token, *deps]
        queues[processor].append(words)
    return queues


def schedule(
    seq_lengths: Sequence[int],
    new_tokens: int,
    num_processors: int | None = None,
    num_heads: int = 16,
    cost_model: CostModel | None = None,
) -> Schedule:
    """The instruction table for decoding a batch: partials, and trees of reductions over them.

    seq_lengths: the keys of each sequence, its `new_tokens` query tokens included; the table names
    sequences by their place here. num_processors: None asks the device, and takes 132 where it does
    not say. num_heads: 16 or 8. cost_model: times in µs that the schedule balances; None takes what
    `mla-jax tune megakernel` measured on the device, else `CostModel()`. A plan made for longer
    sequences also serves shorter ones (`lengths` of `mla_decode`). On the host, in NumPy.
    Errors: ValueError. Source: ThunderKittens' MLA decode scheduler.

    >>> plan = schedule([300], new_tokens=2, num_processors=2)
    >>> plan.instructions.shape
    (2, 2, 32)
    >>> plan.instructions[0, 0, :9].tolist(), plan.dependencies
    ([1, 0, -1, 0, 0, 0, 0, 160, 300], {132: [1, 0], 133: [1, 0]})
    >>> round(plan.makespan, 2)
    21.25
    """
    lengths = [int(length) for length in seq_lengths]
    if not lengths:
        raise ValueError("seq_lengths: got no sequence, expected at least one")
    if min(lengths) < 0 or max(lengths) >= 2**31:
        raise ValueError(
            f"seq_lengths: got {min(lengths)} to {max(lengths)}, expected 0 to 2147483647"
        )
    if new_tokens < 1:
        raise ValueError(f"new_tokens: got {new_tokens}, expected at least 1")
    device = current_device()
    if num_processors is None:
        num_processors = device.num_cores or PROCESSORS
    if num_processors < 1:
        raise ValueError(f"num_processors: got {num_processors}, expected None or at least 1")
    if cost_model is None:
        cost_model = device_costs(device, min(QUERY_TOKENS, new_tokens) * num_heads)
    jobs = [
        _Job(batch, q_seq, min(QUERY_TOKENS, new_tokens - q_seq), length)
        for batch, length in enumerate(lengths)
        for q_seq in range(0, new_tokens, QUERY_TOKENS)
    ]
    if len(jobs) > num_processors:
        queues = _schedule_whole(jobs, num_processors, cost_model)
    else:
        owned = split_processors(
            [(job.tokens, job.length) for job in jobs], num_processors, cost_model
        )
        uids = itertools.count(max(FIRST_REDUCTION, sum(owned)))
        queues = [
            queue
            for job, count, first in zip(
                jobs, owned, itertools.accumulate(owned, initial=0), strict=False
            )
            for queue in _schedule_split(job, count, cost_model, first, uids)
        ]
        queues += [[] for _ in range(num_processors - len(queues))]
    return Schedule(
        instructions=pack_queues(queues),
        batch=len(lengths),
        new_tokens=new_tokens,
        num_heads=num_heads,
        cost_model=cost_model,
    )
