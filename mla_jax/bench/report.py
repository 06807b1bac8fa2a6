"""Results files as Markdown: the tables of the README and of the documentation.

Every number comes from a file in `results/`, which `read` checks: what stands in a table was
measured, by the command and on the device that the file names.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mla_jax.bench.paged import PEERS_PAGE, SHAPES

Row = dict[str, Any]
Document = dict[str, Any]

FOLDER = Path(__file__).parent / "results"
HEADER = {"command": str, "versions": dict, "python": str, "device": str, "commit": str}
PEERS = {
    "flash-mla": "FlashMLA",
    "xla": "XLA",
    "cudnn": "cuDNN",
    f"page {PEERS_PAGE}": "pages of 64",
    "cudnn contiguous": "cuDNN without pages",
    "xla contiguous": "XLA without pages",
    "dense": "all keys",
}
PATTERNS = {"dense": "all keys", "causal": "causal", "blocks25": "a quarter of the blocks"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first of a row says what was measured, and is the only one of its kind."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """One line a row, below a header.

        >>> print(Table(columns=("shape", "µs"), rows=(("B1", "11.6"),)).markdown())
        | shape | µs |
        |---|---|
        | B1 | 11.6 |
        """
        lines = [_line(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *map(_line, self.rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def names() -> list[str]:
    """The results that come with the package, without .json.

    >>> "paged_decode_h200" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(source: str | Path) -> Document:
    """A results file, by its path or by one of `names()`, checked.

    Errors: ValueError, naming the file, where a field is missing or of another type, a number is
    not finite, or a ratio is not the peer's time over ours.

    >>> read("paged_decode_h200")["device"]
    'NVIDIA H200'
    """
    path = FOLDER / f"{source}.json" if isinstance(source, str) else source
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path.name}: got a {type(document).__name__}, expected an object")
    for field, kind in HEADER.items():
        if not isinstance(document.get(field), kind):
            raise ValueError(f"{path.name}: {field} is no {kind.__name__}: {document.get(field)!r}")
    rows = document.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path.name}: rows is no list of objects")
    for number, row in enumerate(rows):
        if fault := _fault(row):
            raise ValueError(f"{path.name}: rows[{number}]: {fault}")
    return document


def _fault(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    for field in ("op", "shape"):
        if not isinstance(row.get(field), str):
            return f"{field} is no text: {row.get(field)!r}"
    for field, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field} is {value}"
    if "ratio" in row:
        for field in ("ours_us", "peer_us"):
            if not isinstance(row.get(field), float | int) or not row[field] > 0:
                return f"{field} is no time: {row.get(field)!r}"
        if not math.isclose(row["ratio"], row["peer_us"] / row["ours_us"], rel_tol=1e-6):
            return f"ratio is {row['ratio']}, expected peer_us / ours_us"
    return None


def paged_label(name: str) -> str:
    """A shape of the paged benchmark in words.

    >>> paged_label("B128-h128-s4096-q2")
    '128 × 128, 4,096, two query tokens'
    >>> paged_label("long4-h16-q4")
    '1,696 to 45,118, four requests × 16, four query tokens'
    """
    even = re.fullmatch(r"B(\d+)-h(\d+)-s(\d+)(?:-q(\d+))?(?:-p(\d+))?", name)
    if even:
        batch, heads, length, tokens, page = (int(part or 0) for part in even.groups())
        text = f"{batch} × {heads}, {length:,}"
    elif normal := re.fullmatch(r"normal(\d+)-h(\d+)", name):
        text, tokens, page = "{} × {}, 1–8,192 (normal, mean 4,096)".format(*normal.groups()), 0, 0
    elif shape := SHAPES.get(name):
        lengths, tokens, page = shape.lengths, shape.tokens, 0
        count = len(lengths)
        requests = NUMBERS[count] if count < len(NUMBERS) else count
        text = f"{min(lengths):,} to {max(lengths):,}, {requests} requests × {shape.heads}"
    else:
        return name
    text += f", {NUMBERS[tokens]} query tokens" if tokens > 1 else ""
    return text + (f", pages of {page}" if page else "")


def _mode(row: Row) -> str:
    """What sets a row apart from others of its shape: another dtype than the usual, or a mode."""
    modes = [] if row["dtype"] == "bfloat16" else [row["dtype"]]
    modes += ["deterministic"] if row.get("deterministic") else []
    return "".join(f", {mode}" for mode in modes)


def _paged(rows: Sequence[Row]) -> list[Table]:
    """A table for each peer."""
    tables = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = tuple(
            (
                paged_label(row["shape"]) + _mode(row),
                f"`{row['backend']}`",
                f"{row['ours_us']:,.1f}",
                f"{row['peer_us']:,.1f}",
                f"{row['ratio']:.2f}",
                f"{row['times_floor']:.2f}",
            )
            for row in rows
            if row["peer"] == peer
        )
        first = "batch × heads, cached tokens"
        title = f"{PEERS.get(peer, peer)}, µs"
        columns = (first, "backend", "µs", title, "ratio", "times the floor")
        tables.append(Table(columns=columns, rows=cells))
    return tables


def _decode_step(rows: Sequence[Row]) -> list[Table]:
    cells = tuple(
        (
            row["shape"].split()[0].removeprefix("B"),
            f"{row['ms_a_step']:.2f}",
            f"{row['tokens_s']:,.0f}",
            f"{row['floor_ms']:.2f}",
            f"{row['times_floor']:.2f}",
        )
        for row in rows
    )
    columns = ("batch", "ms a step", "tokens/s", "floor, ms", "times the floor")
    return [Table(columns=columns, rows=cells)]


def _prefill(rows: Sequence[Row]) -> list[Table]:
    """Forward, of as many heads as most files have: a row for all peers of a shape."""
    cells = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        match = re.fullmatch(r"h16-t(\d+)", shape)
        if match is None:
            continue
        own = [row for row in rows if row["shape"] == shape]
        rates = sorted(row["tflop_s"] for row in own)
        ratios = {row["peer"]: row["ratio"] for row in own}
        xla = f"{ratios['xla']:.1f}" if "xla" in ratios else "scores do not fit"
        cudnn = f"{ratios['cudnn']:.2f}" if "cudnn" in ratios else "–"
        speed = f"{rates[0]:.0f}–{rates[-1]:.0f}"
        cells.append((f"{int(match[1]):,}", speed, cudnn, xla))
    columns = ("tokens", "TFLOP/s", "against cuDNN", "against XLA without a kernel")
    return [Table(columns=columns, rows=tuple(cells))] if cells else []


def grouped_label(name: str) -> str:
    """A shape of the grouped-query benchmark in words.

    >>> grouped_label("B64-h32-kv8-d128-s4096")
    '64 × 32:8 × 128, 4,096'
    >>> grouped_label("h16-d128-t16384-causal")
    '16 × 128, 16,384, causal'
    """
    if decode := re.fullmatch(r"B(\d+)-h(\d+)-kv(\d+)-d(\d+)-s(\d+)", name):
        batch, heads, kv_heads, width, length = map(int, decode.groups())
        return f"{batch} × {heads}:{kv_heads} × {width}, {length:,}"
    if prefill := re.fullmatch(r"h(\d+)-d(\d+)-t(\d+)-(\w+)", name):
        heads, width, tokens, pattern = prefill.groups()
        return f"{heads} × {width}, {int(tokens):,}, {PATTERNS.get(pattern, pattern)}"
    return name


def _grouped(rows: Sequence[Row]) -> list[Table]:
    """A row for all peers of a shape: ratios, and what they should reach, where that is said."""

    def reached(row: Row | None, field: str, bar: str) -> str:
        if row is None or field not in row:
            return "–"
        return f"{row[field]:.2f}" + (f" (at least {row[bar]:g})" if bar in row else "")

    decode = rows[0]["op"] == "grouped_decode"
    first = "batch × heads:key heads × width, cached tokens" if decode else "heads × width, tokens"
    speed = "of a copy's rate" if decode else "TFLOP/s"
    peers = list(dict.fromkeys(row["peer"] for row in rows if "peer" in row))
    cells = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        of_peer = {row.get("peer"): row for row in own}
        cells.append(
            (
                grouped_label(shape),
                f"`{own[0]['backend']}`",
                f"{own[0]['ours_us']:,.1f}",
                f"{own[0]['alone_us']:,.1f}",
                reached(own[0], "of_copy", "bar_of_copy")
                if decode
                else f"{own[0]['tflop_s']:,.0f}",
                *(reached(of_peer.get(peer), "ratio", "bar") for peer in peers),
            )
        )
    against = (f"against {PEERS.get(peer, peer)}" for peer in peers)
    columns = (first, "backend", "µs", "alone, µs", speed, *against)
    return [Table(columns=columns, rows=tuple(cells))]


def _all_reduce(rows: Sequence[Row]) -> list[Table]:
    cells = []
    for row in rows:
        count, dim = row["shape"].split("x")
        bar = f"{row['bar_us']:.0f}" if "bar_us" in row else "–"
        micros, speed = f"{row['ours_us']:,.1f}", f"{row['gb_s']:,.1f}"
        cells.append((f"{int(count):,} × {int(dim):,}", str(row["devices"]), micros, bar, speed))
    columns = ("summed", "devices", "µs", "at most, µs", "GB/s a device")
    return [Table(columns=columns, rows=tuple(cells))]


def _sharded(rows: Sequence[Row]) -> list[Table]:
    """Many devices beside one: a row a peer."""
    cells = tuple(
        (
            f"{paged_label(row['shape'])}, {row['mesh']}, beside {row['peer']}",
            f"{row['ours_us']:,.1f}",
            f"{row['peer_us']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bar']:.1f}" if "bar" in row else "–",
            f"{row['times_floor']:.2f}",
        )
        for row in rows
    )
    first = "batch × heads, cached tokens"
    columns = (first, "µs", "one device, µs", "ratio", "at least", "times the floor")
    return [Table(columns=columns, rows=cells)]


def _sharded_step(rows: Sequence[Row]) -> list[Table]:
    cells = tuple(
        (
            f"{row['shape'].split('-')[0].removeprefix('B')}, {row['mesh']}",
            f"{row['ms_a_step']:.2f}",
            f"{row['tokens_s']:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{row['times_floor']:.2f}",
        )
        for row in rows
    )
    columns = ("batch, mesh", "ms a step", "tokens/s", "speed-up", "a device", "times the floor")
    return [Table(columns=columns, rows=cells)]


def _any(rows: Sequence[Row]) -> list[Table]:
    """Every field but the op, as it is."""
    columns = tuple(field for field in dict.fromkeys(key for row in rows for key in row))
    columns = tuple(field for field in columns if field not in ("op", "dtype"))

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    return [
        Table(columns=columns, rows=tuple(tuple(cell(row.get(c)) for c in columns) for row in rows))
    ]


# By the op of a row, and a field that its rows have; what is not here is shown field by field.
KINDS: tuple[tuple[str, str, Callable[[Sequence[Row]], list[Table]]], ...] = (
    ("paged_decode", "times_floor", _paged),
    ("decode_step", "ms_a_step", _decode_step),
    ("causal_prefill", "peer", _prefill),
    *((op, "alone_us", _grouped) for op in ("grouped_decode", "sparse_prefill")),
    ("all_reduce", "gb_s", _all_reduce),
    *((f"sharded_{part}", "ratio", _sharded) for part in ("attention", "layer", "context")),
    ("sharded_step", "efficiency", _sharded_step),
)


def tables(document: Document) -> dict[str, list[Table]]:
    """The tables of a results file, by op."""
    found: dict[str, list[Table]] = {}
    for op in dict.fromkeys(row["op"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["op"] == op]
        made: list[Table] = []
        for known, field, make in KINDS:
            if known == op and all(field in row for row in rows):
                made = make(rows)
        found[op] = made or _any(rows)
    return found


def markdown(name: str, document: Document) -> str:
    """A section on a results file: what made it, the rates of that run, and its tables."""
    versions = ", ".join(
        f"{package} {version}" for package, version in document["versions"].items()
    )
    partial = "Interrupted: not all shapes were measured. " if document.get("partial") else ""
    devices = f"{document.get('devices', 'one')} {document['device']}"
    parts = [
        f"## {name}",
        f"{partial}`{document['command']}` on {devices}; {versions}; commit "
        f"`{document['commit'][:12]}`.",
    ]
    if ceilings := document.get("ceilings"):
        rates = (f"{name} {value:,.1f}" for name, value in ceilings.items())
        parts.append(f"Rates of plain operations in the same run: {', '.join(rates)}.")
    if link := document.get("link"):
        parts.append(
            f"The link in the same run: {link['gb_per_s']:,.1f} GB/s a device in one direction, "
            f"{link['latency_us']:,.1f} µs a message."
        )
    for op, made in tables(document).items():
        parts += [f"### {op}", *(table.markdown() for table in made)]
    for peer, mean in document.get("geometric_means", {}).items():
        parts.append(f"Geometric mean of the ratios to {PEERS.get(peer, peer)}: {mean:.2f}.")
    return "\n\n".join(parts) + "\n"


def updated(text: str) -> str:
    """A Markdown document whose tables of results say what the files say now.

    A table belongs to the results file that was last linked to before it, and to the one of its
    tables that has the same columns; a row is found by its first cell, so a document may leave rows
    out. Errors: ValueError for a row that the file does not have.
    """
    lines = text.split("\n")
    source: Document | None = None
    own: Table | None = None
    for number, line in enumerate(lines):
        for link in re.findall(r"bench/results/(\w+)\.json", line):
            source = read(link)
        if not line.startswith("|"):
            own = None
        elif own is not None and not line.startswith("|---"):
            label = line.split(" | ")[0].removeprefix("| ")
            found = [row for row in own.rows if row[0] == label]
            if len(found) != 1:
                raise ValueError(f"line {number + 1}: {label!r} is in {len(found)} rows of results")
            lines[number] = _line(found[0])
        elif own is None and source is not None:
            every = [table for made in tables(source).values() for table in made]
            own = next((table for table in every if line == _line(table.columns)), None)
    return "\n".join(lines)
