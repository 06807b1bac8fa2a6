"""What the blocks of a paged attention launch are told, as tables of small integers."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.schedule import SplitPlan
from pallas_kernels.schedule.arrays import positions, sum_before


class Units(NamedTuple):
    """Query rows, int32 [units] each: a tile of one request's rows and the keys that they see.

    The request's rows stand at base:base + rows of the flat queries, token-major and head-minor;
    the unit's are those from `offset` on. Row i is the request's token i // heads and sees the
    first seen + i // heads of the `length` keys in its pages, whose ids stand from first_id on.
    Rows up to base + owned are padding: they see nothing, and are written as such.
    """

    base: Int[Array, " units"]
    offset: Int[Array, " units"]
    rows: Int[Array, " units"]
    owned: Int[Array, " units"]
    first_id: Int[Array, " units"]
    length: Int[Array, " units"]
    seen: Int[Array, " units"]


class Segment(NamedTuple):
    """A row of Work.segments, in a kernel: its first step, its last + 1, its slot or -1, and its
    unit's fields."""

    begin: Array
    end: Array
    slot: Array
    base: Array
    offset: Array
    rows: Array
    owned: Array
    first_id: Array
    length: Array
    seen: Array


class Work(NamedTuple):
    """A plan as the kernels read it: everything about one segment, or one merge, in one row.

    A block learns all that it needs to start from its row, so that no load waits for another.
    """

    segments: Int[Array, "segments 10"]  # the fields of Segment
    merges: Int[Array, "merges 5"]  # parts, first slot, the unit's base, offset and owned rows
    splits: Int[Array, "1"]  # how many merges there are, all at the beginning


def most_slots(segments: int, units: int) -> int:
    """A bound on the segments that are parts of split units.

    Every unit has one segment, so the split ones' others are among the rest; of two or more parts
    at most half is the first.
    """
    return min(segments, 2 * (segments - units))


def pack(units: Units, plan: SplitPlan) -> Work:
    """The tables of `plan` over `units`; only the parts of split units have scratch slots."""
    num_units, num_segments = units.base.shape[0], plan.unit.shape[0]
    inside = jnp.minimum(plan.unit, num_units - 1)
    busy = plan.unit < num_units
    in_scratch = jnp.where(plan.parts > 1, plan.parts, 0)
    first_slot = sum_before(in_scratch)
    slot = first_slot[inside] + plan.slot - plan.first_slot[inside]
    slot = jnp.where(busy & (in_scratch[inside] > 0), slot, -1)
    per_unit = jnp.where(busy[:, None], jnp.stack(units, axis=1)[inside], 0)

    most = min(num_units, num_segments - num_units)
    split = positions(in_scratch > 0, most)
    merged = jnp.minimum(split, num_units - 1)
    parts = jnp.where(split < num_units, plan.parts[merged], 0)
    of_unit = (units.base[merged], units.offset[merged], units.owned[merged])
    return Work(
        segments=jnp.concatenate(
            [jnp.stack([plan.begin, plan.end, slot], axis=1), per_unit], axis=1
        ),
        merges=jnp.stack([parts, first_slot[merged], *of_unit], axis=1),
        splits=jnp.sum(in_scratch > 0, dtype=jnp.int32, keepdims=True),
    )
