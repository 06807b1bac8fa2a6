"""The 32 words of an instruction, and a table's instructions sorted by what they are.

    op 0  nothing
    op 1  PARTIAL    uid, dst_batch, dst_seq, q_batch, q_seq, start, end, length
    op 2  REDUCTION  uid, dependencies - 1, dst_batch, dst_seq, then the dependencies' uids

dst_batch at least 0 is the output's row; below, the result goes to row -dst_batch - 1 of a scratch
in float32, which is the instruction's uid. A partial does up to four query tokens from q_seq on and
the keys start:end; length counts all keys that the sequence's last query token sees.
"""

import dataclasses

import numpy as np

WORDS = 32
NO_OP, PARTIAL, REDUCTION = 0, 1, 2
QUERY_TOKENS = 4
"""The most query tokens of a partial."""
FIRST_DEPENDENCY = 5
MOST_DEPENDENCIES = WORDS - FIRST_DEPENDENCY


@dataclasses.dataclass(frozen=True)
class Listed:
    """Every instruction of a table: its `op`, `processor`, place in the queue, and words.

    Fields of the op that an instruction is not are meaningless in its row.
    """

    words: np.ndarray  # [instructions, 32]
    processor: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray) -> "Listed":
        """Those of a table [processors, longest, 32] that are not no-ops, queue by queue."""
        processor, place = np.nonzero(table[..., 0] != NO_OP)
        return cls(table[processor, place], processor, place)

    def where(self, chosen: np.ndarray) -> "Listed":
        """The chosen ones."""
        return Listed(self.words[chosen], self.processor[chosen], self.place[chosen])

    @property
    def partials(self) -> "Listed":
        """The partials, in the table's order."""
        return self.where(self.op == PARTIAL)

    @property
    def reductions(self) -> "Listed":
        """The reductions, in the table's order."""
        return self.where(self.op == REDUCTION)

    @property
    def op(self) -> np.ndarray:
        return self.words[:, 0]

    @property
    def uid(self) -> np.ndarray:
        return self.words[:, 1]

    @property
    def destination(self) -> tuple[np.ndarray, np.ndarray]:
        """(dst_batch, dst_seq)."""
        first = np.where(self.op == REDUCTION, 3, 2)
        index = np.arange(len(first))
        return self.words[index, first], self.words[index, first + 1]

    @property
    def q_batch(self) -> np.ndarray:
        return self.words[:, 4]

    @property
    def q_seq(self) -> np.ndarray:
        return self.words[:, 5]

    @property
    def keys(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, end, length) of partials."""
        return self.words[:, 6], self.words[:, 7], self.words[:, 8]

    @property
    def inputs(self) -> np.ndarray:
        """How many dependencies reductions have; 0 for partials."""
        return np.where(self.op == REDUCTION, self.words[:, 2] + 1, 0)

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """(row of the reduction, uid of the dependency), for each dependency, in order."""
        listed = np.arange(MOST_DEPENDENCIES) < self.inputs[:, None]
        row, column = np.nonzero(listed)
        return row, self.words[row, FIRST_DEPENDENCY + column]

    @property
    def row_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """`edges` with the row of the dependency: every uid must be some instruction's."""
        order = np.argsort(self.uid)
        reducer, dependency = self.edges
        return reducer, order[np.searchsorted(self.uid[order], dependency)]
