"""The reduction tree of one sequence: how many reductions, and when each one's inputs are due.

Built backwards from the end at time 0. A new reduction hangs below the one whose next input is due
latest, and must end by then.
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.schedule.instructions.costs import CostModel
from pallas_kernels.schedule.instructions.quality import cached_quality, input_times
from pallas_kernels.schedule.instructions.words import MOST_DEPENDENCIES


class Tree(NamedTuple):
    """Reductions of one query token, the root first and every parent before its children.

    finish, next_input: in µs before the end; parent: its index, -1 for the root. A partial may
    deliver to reduction i until next_input[i].
    """

    parent: tuple[int, ...]
    finish: tuple[float, ...]
    next_input: tuple[float, ...]

    def by_due(self) -> list[int]:
        """Reductions in the order in which partials go to them: the latest due first."""
        return sorted(range(len(self.parent)), key=lambda i: -self.next_input[i])

    def most_inputs(self, partials: int) -> int:
        """The longest dependency list, with so many partials dealt out in turns."""
        inputs = np.bincount(np.asarray(self.parent) + 1, minlength=len(self.parent) + 1)[1:]
        inputs = inputs[self.by_due()] + partials // len(inputs)
        inputs[: partials % len(inputs)] += 1
        return int(inputs.max())


@functools.lru_cache(maxsize=4096)
def tree_of(reductions: int, costs: CostModel) -> Tree:
    """The tree with so many reductions: each one is the next smaller one's with a leaf more."""
    if reductions == 1:
        return Tree((-1,), (0.0,), (-costs.reduction_tail,))
    parents, finishes, next_input = tree_of(reductions - 1, costs)
    due = list(next_input)
    parent = max(range(len(due)), key=due.__getitem__)
    finish = due[parent]
    due[parent] -= costs.reduction_input
    return Tree((*parents, parent), (*finishes, finish), (*due, finish - costs.reduction_tail))


def best_tree(processors: int, tokens: int, length: int, costs: CostModel) -> Tree:
    """Grown while `get_quality` strictly improves, and until no dependency list is too long.

    Beyond that, no further than a processor holds one reduction: a second one would wait.
    """

    def quality(tree: Tree) -> float:
        return cached_quality(tree.next_input, processors, tokens, costs).of(length)

    number = 1
    while tree_of(number, costs).most_inputs(processors) > MOST_DEPENDENCIES:
        number += 1
    tree = tree_of(number, costs)
    now = quality(tree)
    while (number + 1) * tokens <= processors:
        more = tree_of(number + 1, costs)
        better = quality(more)
        if better <= now or more.most_inputs(processors) > MOST_DEPENDENCIES:
            break
        tree, now, number = more, better, number + 1
    return tree


class Shares(NamedTuple):
    """What the processors of one sequence do: `of_reduction[i]` is where partial i's result goes.

    holders: the processors that hold the reductions of each token, in the order of `Tree.by_due`
    and then of tokens; end: when each processor's partial must end.
    """

    of_reduction: np.ndarray
    holders: np.ndarray
    end: np.ndarray


@functools.lru_cache(maxsize=4096)
def share_out(tree: Tree, processors: int, tokens: int, costs: CostModel) -> Shares:
    """One partial for each processor, dealt to the reductions in turns, the latest due first.

    The processors whose partials are due first hold the reductions; such a one's partial must end
    before the reduction starts. With too few of them, a processor holds several reductions, one
    after the other, the last of which must end in time.
    """
    order = np.asarray(tree.by_due())
    end, first = input_times(np.asarray(tree.next_input)[order], processors, costs.reduction_input)
    end = end.astype(np.float64)
    number = len(order) * tokens
    holders = np.sort(np.argsort(end, kind="stable")[: min(number, processors)])
    holders = holders[np.arange(number) % processors]
    finish = np.repeat(np.asarray(tree.finish)[order], tokens)
    starts = np.repeat(first, tokens) + costs.reduction_latency - costs.reduction_start
    busy, last = np.zeros(processors), np.full(processors, -np.inf)
    np.add.at(busy, holders, finish - starts)
    np.maximum.at(last, holders, finish)
    np.minimum.at(end, holders, starts)
    end[holders] = np.minimum(end[holders], (last - busy)[holders])
    return Shares(order[np.arange(processors) % len(order)], holders, end)


def deal_steps(steps: int, end: np.ndarray, costs: CostModel) -> np.ndarray:
    """Steps of each processor, at least one, so that the earliest start is as late as possible.

    end: when each processor's partial must end; `steps` is at least their number.
    """
    room = (end - costs.partial_overhead) / costs.partial_step
    level = (room.sum() - steps) / len(end)  # where all would start, could steps be divided
    dealt = np.maximum(np.floor(room - level).astype(np.int64), 1)
    while (missing := steps - int(dealt.sum())) < 0:
        # Processors that are due too early have a step all the same: others have fewer.
        start = np.where(dealt > 1, room - dealt, np.inf)
        dealt[np.argsort(start, kind="stable")[: min(-missing, int((dealt > 1).sum()))]] -= 1
    dealt[np.argsort(dealt - room, kind="stable")[:missing]] += 1
    return dealt
