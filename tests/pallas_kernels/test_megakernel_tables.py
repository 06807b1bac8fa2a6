"""The megakernel's instruction tables: as text, and what is refused."""

import dataclasses
import json
import re

import numpy as np
import pytest

from pallas_kernels.schedule import CostModel, Schedule, schedule


def test_json(rng):
    lengths = rng.integers(1, 5000, 5).tolist()
    plan = schedule(lengths, 3, 30, 8, CostModel(partial_step=2.0))
    again = Schedule.from_json(plan.to_json())
    np.testing.assert_array_equal(again.instructions, plan.instructions)
    for name in ("batch", "new_tokens", "num_heads", "cost_model", "bounds", "makespan"):
        assert getattr(again, name) == getattr(plan, name)
    assert again.timeline() == plan.timeline()


@pytest.mark.parametrize("text", ["[]", "{}", "nothing", '{"instructions": 3}'])
def test_no_json_of_a_schedule(text):
    with pytest.raises(ValueError, match=r"not a schedule|Expecting value"):
        Schedule.from_json(text)


def test_json_of_an_over_long_dependency_list():
    fields = json.loads(schedule([300], 1, num_processors=2).to_json())
    fields["instructions"][0].append([2, 132, 29, 0, 0, *range(30)])
    with pytest.raises(ValueError, match="dependency list is over-long"):
        Schedule.from_json(json.dumps(fields))


# Changes of words in the golden table, and what is said of them. (processor, place, word): value.
REFUSED = {
    "wrong uid": ({(0, 1, 5): 7}, "uid 7 is a dependency that no instruction produces"),
    "a uid twice": ({(1, 0, 1): 0}, "uid 0 stands 2 times, expected once"),
    "a negative uid": ({(0, 1, 1): -4}, "uid -4 is negative"),
    "another's scratch row": ({(0, 0, 2): -9}, "uid 0 writes another uid's scratch row"),
    "a dropped producer": (
        {(1, 0, word): 0 for word in range(9)},
        "uid 0 is the last of its sequence and does not end at length",
    ),
    "a dropped reduction": (
        {(1, 1, word): 0 for word in range(7)},
        "expected one result for each of 2 query tokens of 1 sequences, got 1 of 2 in 1 writes",
    ),
    "an unused result": ({(0, 1, 2): 0}, "uid 0 has a result that no reduction uses"),
    "twice the same": ({(0, 1, 6): 1}, "uid 0 has a result that no reduction uses"),
    "over-long": (
        {(0, 1, 2): 27},
        "uid 132 has a dependency list that is empty or over-long, expected 1 to 27",
    ),
    "no dependency": (
        {(0, 1, 2): -1},
        "uid 132 has a dependency list that is empty or over-long, expected 1 to 27",
    ),
    "a gap": ({(1, 0, 6): 192}, "uid 1 leaves keys out or covers some twice"),
    "an overlap": ({(1, 0, 6): 128}, "uid 1 leaves keys out or covers some twice"),
    "an odd start": (
        {(0, 0, 7): 150, (1, 0, 6): 150},
        "uid 1 starts at no multiple of 32",
    ),
    "no keys": ({(1, 0, 7): 160}, "uid 1 has no keys"),
    "beyond the length": (
        {(1, 0, 7): 301},
        "uid 1 is the last of its sequence and does not end at length",
    ),
    "two lengths": ({(0, 0, 8): 299}, "uid 1 has another length than its sequence"),
    "another token": ({(1, 1, 4): 2}, "uid 133 writes a query token outside 0 to 1"),
    "another q_seq": (
        {(0, 0, 5): 1},
        "uid 0 has q_seq outside the multiples of 4 below 2 query tokens",
    ),
    "another op": ({(0, 0, 0): 3}, "got op 1 to 3, expected 0, 1 or 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, text = REFUSED[name]
    plan = schedule([300], 2, num_processors=2)
    table = np.array(plan.instructions)
    for place, value in changes.items():
        table[place] = value
    with pytest.raises(ValueError, match=f"^instructions: {re.escape(text)}$"):
        Schedule(instructions=table, batch=1, new_tokens=2)


def test_cycle():
    """Two reductions that each wait for the other, beside a sound tree."""
    fields = json.loads(schedule([300], 1, num_processors=2).to_json())
    fields["instructions"][0] += [[2, 140, 0, -141, 0, 141], [2, 141, 0, -142, 0, 140]]
    with pytest.raises(ValueError, match=r"^instructions: got a cycle of dependencies"):
        Schedule.from_json(json.dumps(fields))


def test_queues_that_wait_for_each_other():
    """No cycle of dependencies, but a reduction stands before what it needs in its queue."""
    plan = schedule([300], 1, num_processors=2)
    table = np.array(plan.instructions)
    holder = int(np.argmax((table[..., 0] == 2).any(axis=1)))
    table[holder] = table[holder][::-1]
    with pytest.raises(ValueError, match=r"^instructions: uids 132 wait for each other in a cycle"):
        Schedule(instructions=table, batch=1, new_tokens=1)


def test_sequences_put_together():
    """Trees that take a partial of each other: every result is used once, and all the same."""
    plan = schedule([4096, 4096], 1, num_processors=4)
    table = np.array(plan.instructions)
    reductions = np.argwhere(table[..., 0] == 2)
    assert len(reductions) == 2
    a, b = (tuple(place) for place in reductions)
    table[a][5], table[b][5] = int(table[b][5]), int(table[a][5])
    with pytest.raises(ValueError, match=r"^instructions: uid \d+ puts different sequences"):
        Schedule(instructions=table, batch=2, new_tokens=1)


def test_table_form():
    plan = schedule([300], 2, num_processors=2)
    with pytest.raises(ValueError, match=r"got shape \(2, 32\), expected \[processors, longest"):
        dataclasses.replace(plan, instructions=plan.instructions[:, 0])
    with pytest.raises(TypeError, match="got dtype int64, expected int32"):
        dataclasses.replace(plan, instructions=plan.instructions.astype(np.int64))
    with pytest.raises(ValueError, match="got no-ops only"):
        dataclasses.replace(plan, instructions=np.zeros_like(plan.instructions))
    with pytest.raises(ValueError, match=r"^bounds: got \(16, 16, 64, 0\), expected at least"):
        dataclasses.replace(plan, bounds=(16, 16, 64, 0))
    with pytest.raises(ValueError, match="read-only"):
        plan.instructions[0, 0, 0] = 0
