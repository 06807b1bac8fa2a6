"""How good a reduction tree is: the time at which the work under it would have to start.

Times run backwards from 0, the end of the sequence's last instruction, so that more is better. The
arithmetic is float32, step by step as the seed's scheduler does it: `Quality` does everything that
does not depend on the length once, and its results are those of `get_quality` to the bit.
"""

import bisect
import functools
from collections.abc import Sequence

import numpy as np

from pallas_kernels.schedule.instructions.costs import DEFAULT_COSTS, CostModel

STEP = 32
"""Keys in a step, the granule of the schedule."""
IMPOSSIBLE = -999_999_999.0
"""The quality of more reductions than processors."""


def steps_of(length: int) -> int:
    """The steps that so many keys take."""
    return -(-length // STEP)


def input_times(
    next_times: np.ndarray, partials: int, cost: float
) -> tuple[np.ndarray, np.ndarray]:
    """(when each of `partials` must end, when each reduction's first input must), float32.

    Partials go to the reductions in turns. Every input makes the one before it due earlier.
    """
    number = len(next_times)
    rounds = -(-partials // number)
    table = np.full((rounds + 1, number), cost, np.float32)
    table[0] = next_times
    times = np.subtract.accumulate(table, axis=0)
    full, rest = divmod(partials, number)
    first = np.where(np.arange(number) < rest, times[min(full + 1, rounds)], times[full])
    return times[1:].ravel()[:partials], first


class Quality:
    """`get_quality` of one tree on so many processors, as a function of the length.

    `rising[i]` is what the i-th processor gets to level it with the last one; from there on, all of
    them take turns. Either way a few comparisons give the earliest start.
    """

    def __init__(
        self, next_times: Sequence[float], processors: int, tokens: int, costs: CostModel
    ) -> None:
        times = np.sort(np.asarray(next_times, np.float32))[::-1]
        ends, first = input_times(times, processors, costs.reduction_input)
        ends = np.sort(ends)
        held = np.repeat(
            first
            + np.float32(costs.reduction_latency)
            - np.float32(costs.reduction_start_in_quality),
            tokens,
        )[:processors]
        ends[: len(held)] = held
        ends = np.sort(ends)[::-1]
        self.step = np.float32(costs.partial_step)
        self.overhead = np.float32(costs.partial_overhead)
        # Halves go up; a half added in float32 could round up by itself.
        levels = ((ends - ends[-1]) / self.step).astype(np.float64)
        rising = np.floor(levels + 0.5).astype(np.int64)
        levelled = np.where(rising > 0, ends - self._times(rising) - self.overhead, ends)
        self.ends = ends
        self.given = np.concatenate([[0], np.cumsum(rising)]).tolist()
        self.least = np.minimum.accumulate(levelled)
        self.levelled = np.sort(levelled)[::-1]

    def _times(self, steps: int | np.ndarray) -> np.ndarray:
        return np.asarray(steps).astype(np.float32) * self.step

    def of(self, length: int) -> float:
        """The quality for a sequence of so many keys."""
        steps = steps_of(length)
        number = len(self.ends)
        if steps < self.given[-1]:
            whole = bisect.bisect_right(self.given, steps) - 1
            value = self.ends[-1]
            if whole:
                value = min(value, self.least[whole - 1])
            if rest := steps - self.given[whole]:
                value = min(value, self.ends[whole] - self._times(rest) - self.overhead)
            return float(value)
        full, rest = divmod(steps - self.given[-1], number)
        value = self.levelled[-1] - self._times(full)
        if rest:
            value = min(value, self.levelled[rest - 1] - self._times(full + 1))
        return float(value)


def get_quality(
    next_times: Sequence[float],
    num_processors: int,
    num_tokens: int,
    seq_length: int,
    *,
    cost_model: CostModel = DEFAULT_COSTS,
) -> float:
    """How good a reduction tree is: when its earliest partial must start, in µs, at best 0.

    next_times: for each reduction of one query token, when its next input is due, in µs before the
    end. The `num_processors` processors share a sequence of `seq_length` keys, and each of the
    `num_tokens` query tokens has such a tree. float32 arithmetic in the order of the seed's
    scheduler; -999999999 for more reductions than processors. Source: ThunderKittens' MLA decode
    scheduler (`__get_quality__`).
    Errors: ValueError for no reduction, no processor, no token or a negative length.

    >>> round(get_quality([-2.9, -5], 4, 4, 1024), 2)
    -16.62
    """
    if len(next_times) == 0:
        raise ValueError("next_times: got no time, expected one for each reduction")
    for name, value, least in (
        ("num_processors", num_processors, 1),
        ("num_tokens", num_tokens, 1),
        ("seq_length", seq_length, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if len(next_times) > num_processors:
        return IMPOSSIBLE
    return Quality(next_times, num_processors, num_tokens, cost_model).of(seq_length)


@functools.lru_cache(maxsize=4096)
def cached_quality(
    next_times: tuple[float, ...], processors: int, tokens: int, costs: CostModel
) -> Quality:
    """`Quality`, made once for all sequences."""
    return Quality(next_times, processors, tokens, costs)
