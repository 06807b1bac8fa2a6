"""A schedule: the instruction table that a megakernel launch executes, and what it promises."""

import dataclasses
import functools
import json
from typing import Self

import jax
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.schedule.instructions.check import check_table
from pallas_kernels.schedule.instructions.costs import DEFAULT_COSTS, CostModel
from pallas_kernels.schedule.instructions.timeline import Event, makespan, simulate_times
from pallas_kernels.schedule.instructions.words import FIRST_DEPENDENCY, WORDS, Listed

HEADS = (16, 8)


def bucket(number: int, least: int) -> int:
    """The next power of two: numbers that are near each other share a compilation."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def table_bounds(listed: Listed, level: np.ndarray) -> tuple[int, int, int, int]:
    """(partials, reductions, scratch rows, depth), each but the depth rounded up to a bucket."""
    to_batch, _ = listed.destination
    rows = int(max(0, -to_batch.min()))
    return (
        bucket(len(listed.partials.uid), 16),
        bucket(len(listed.reductions.uid), 16),
        bucket(rows, 64),
        int(level.max()),
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("instructions",),
    meta_fields=("batch", "new_tokens", "num_heads", "cost_model", "bounds"),
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Instructions for every processor: a pytree whose table may be traced.

    instructions: int32 [processors, longest, 32], words as in `words.py`; no-ops fill each queue up
    to `longest`. bounds: static sizes that nearby schedules share, so that one compilation serves
    them; found from the table if not given. A table in NumPy is checked and becomes read-only.
    Errors: ValueError or TypeError for a table that is not sound, naming the instruction's uid.
    """

    instructions: Int[np.ndarray, "processors longest 32"] | Int[Array, "processors longest 32"]
    batch: int
    new_tokens: int
    num_heads: int = 16
    cost_model: CostModel = DEFAULT_COSTS
    bounds: tuple[int, int, int, int] | None = None
    """At least (partials, reductions, scratch rows, depth of the reductions)."""

    def __post_init__(self) -> None:
        if not isinstance(self.instructions, np.ndarray):
            return
        for name in ("batch", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.num_heads not in HEADS:
            raise ValueError(f"num_heads: got {self.num_heads}, expected 16 or 8")
        table = self.instructions.copy()
        table.setflags(write=False)
        object.__setattr__(self, "instructions", table)
        bounds = table_bounds(*self._checked)
        if self.bounds is None:
            object.__setattr__(self, "bounds", bounds)
        elif any(given < found for given, found in zip(self.bounds, bounds, strict=True)):
            raise ValueError(f"bounds: got {self.bounds}, expected at least {bounds}")
        self.timeline()

    @functools.cached_property
    def _checked(self) -> tuple[Listed, np.ndarray]:
        return check_table(np.asarray(self.instructions), self.new_tokens, self.batch)

    @functools.cached_property
    def _timeline(self) -> tuple[Event, ...]:
        return simulate_times(self._checked[0], self.cost_model)

    def timeline(self) -> tuple[Event, ...]:
        """When each instruction starts and ends under the cost model, by processor and time."""
        return self._timeline

    @property
    def makespan(self) -> float:
        """When the last instruction ends under the cost model, in µs."""
        return makespan(self._timeline)

    @property
    def lengths(self) -> np.ndarray:
        """Keys of each sequence, the new tokens included: int32 [batch]."""
        partials = self._checked[0].partials
        lengths = np.zeros(self.batch, np.int32)
        lengths[partials.q_batch] = partials.keys[2]
        return lengths

    @property
    def uids(self) -> np.ndarray:
        """Every instruction's uid, ascending."""
        return np.sort(self._checked[0].uid)

    @property
    def dependencies(self) -> dict[int, list[int]]:
        """The uids that each reduction puts together, in its order."""
        reductions = self._checked[0].reductions
        lists = (
            words[FIRST_DEPENDENCY : FIRST_DEPENDENCY + count].tolist()
            for words, count in zip(reductions.words, reductions.inputs, strict=True)
        )
        return dict(zip(reductions.uid.tolist(), lists, strict=True))

    def as_large_as(self, other: "Schedule") -> Self:
        """The same instructions in at least `other`'s sizes, so that a compilation serves both.

        Processors that are added have nothing to do.
        """
        table, least = np.asarray(self.instructions), other.instructions.shape
        missing = [(0, max(least[axis] - table.shape[axis], 0)) for axis in range(3)]
        assert self.bounds is not None
        assert other.bounds is not None
        bounds = tuple(map(max, self.bounds, other.bounds))
        return dataclasses.replace(self, instructions=np.pad(table, missing), bounds=bounds)

    def to_json(self) -> str:
        """The schedule as text, for `from_json`; no-ops and trailing zeros are left out."""
        queues = [
            [np.trim_zeros(words, "b").tolist() for words in queue if words[0]]
            for queue in np.asarray(self.instructions)
        ]
        fields = {name: getattr(self, name) for name in ("batch", "new_tokens", "num_heads")}
        costs = dataclasses.asdict(self.cost_model)
        return json.dumps({**fields, "cost_model": costs, "instructions": queues})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The schedule that `to_json` wrote, checked anew. Errors: ValueError."""
        try:
            fields = json.loads(text)
            queues = fields.pop("instructions")
            costs = CostModel(**fields.pop("cost_model"))
            table = pack_queues(queues)
            return cls(instructions=table, cost_model=costs, **fields)
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"text: not a schedule: {error}") from None


def pack_queues(queues: list[list[list[int]]]) -> np.ndarray:
    """A table of the processors' queues of instructions, padded with no-ops and zeros."""
    table = np.zeros((len(queues), bucket(max(map(len, queues), default=0), 2), WORDS), np.int32)
    for row, queue in zip(table, queues, strict=True):
        for words, instruction in zip(row, queue, strict=False):
            if len(instruction) > len(words):
                raise ValueError(
                    f"instructions: got one of {len(instruction)} words, expected at most {WORDS}: "
                    "a dependency list is over-long"
                )
            words[: len(instruction)] = instruction
    return table
