"""The megakernel's schedules: how long one takes to make, what it promises, and its picture."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from mla_jax.megakernel import Schedule, schedule
from pallas_kernels.schedule.instructions import quality, tree

# Name: tokens of each sequence, new tokens. The megakernel's shapes of record.
SHAPES = {
    "four-s45118-n4": ([4641, 45118, 1730, 1696], 4),
    "four-s45118-n1": ([4641, 45118, 1730, 1696], 1),
    "B1-s65536-n1": ([65536], 1),
    "B64-s512-n2": ([512] * 64, 2),
    "B64-ragged-n4": ([256 + 12 * i for i in range(64)], 4),
    "B132-s4096-n4": ([4096] * 132, 4),
}
COLOURS = {"partial": "blue", "reduction": "yellow"}


def _forget() -> None:
    """What earlier schedules left in caches."""
    for cached in (quality.cached_quality, tree.tree_of, tree.share_out):
        cached.cache_clear()


def run(num_processors: int | None = None, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """A row for each shape: ms to make its schedule, first and again, and the model's makespan."""
    for name, (lengths, new_tokens) in SHAPES.items():

        def build(lengths=lengths, new_tokens=new_tokens, *, cold: bool) -> tuple[Schedule, float]:
            if cold:
                _forget()
            start = time.perf_counter()
            plan = schedule(lengths, new_tokens, num_processors)
            return plan, 1e3 * (time.perf_counter() - start)

        plan, _ = build(cold=True)
        ops = [event.op for event in plan.timeline()]
        medians = {
            kind: statistics.median(build(cold=kind == "first")[1] for _ in range(repeats))
            for kind in ("first", "again")
        }
        yield {
            "op": "schedule",
            "shape": name,
            **{f"{kind}_ms": value for kind, value in medians.items()},
            "makespan_us": plan.makespan,
            "partials": ops.count("partial"),
            "reductions": ops.count("reduction"),
        }


def picture(plan: Schedule, columns: int = 100) -> Text:
    """Processors by time: a line each, # while a partial runs and = while a reduction does.

    A reduction's time includes what it waits for its inputs. Coloured in a terminal.

    >>> print(picture(schedule([300], new_tokens=2, num_processors=2), columns=24).plain)
      0 #################=======
      1 #################=======
    0 to 21.2 µs; # partial, = reduction
    """
    text = Text()
    lines = {processor: Text() for processor in range(plan.instructions.shape[0])}
    for event in plan.timeline():
        line = lines[event.processor]
        start, end = (
            round(moment * columns / plan.makespan) for moment in (event.start, event.end)
        )
        line.pad_right(start - len(line))
        mark = "#" if event.op == "partial" else "="
        line.append(mark * (end - start), style=COLOURS[event.op])
    for processor, line in lines.items():
        text.append(f"{processor:3} ").append_text(line).append("\n")
    return text.append(f"0 to {plan.makespan:.1f} µs; # partial, = reduction")
