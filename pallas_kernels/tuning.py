"""Tile choices found by measuring (`mla-jax tune`): one table a device, read when first asked."""

import functools
import json
import re
from pathlib import Path
from typing import Any

from pallas_kernels.device import Device

Entry = dict[str, Any]
FOLDER = Path(__file__).with_name("tuned")
FOUND = ("tiles", "costs", "us", "default_us")
"""What an entry says of its key, which is all of its other fields."""


def table_name(device_kind: str) -> str:
    """The file of a device's table: "NVIDIA H200" is nvidia_h200.json."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def read_table(path: Path) -> list[Entry]:
    """The entries of a table; none if there is no file. Errors: ValueError, for another file."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())["entries"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: got a file that holds no table, expected JSON entries") from None


@functools.cache
def _table(name: str) -> list[Entry]:
    return read_table(FOLDER / name)


def tuned(op: str, device: Device, found: str = "tiles", **key: Any) -> dict[str, Any] | None:
    """The tiles (or costs) measured for `op` at exactly `key` on `device`; None if none were."""
    wanted = {"op": op, **key}
    for entry in _table(table_name(device.kind)):
        if all(entry.get(name) == value for name, value in wanted.items()):
            return entry[found]
    return None


def record(path: Path, entry: Entry, header: dict[str, Any]) -> None:
    """Put `entry` into the table at `path`, in place of the one of its key, under a new header.

    The file is written to a neighbour first, then renamed; this process's next choice reads it.
    """

    def key(entry: Entry) -> Entry:
        return {name: value for name, value in entry.items() if name not in FOUND}

    entries = [old for old in read_table(path) if key(old) != key(entry)] + [entry]
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**header, "entries": entries}, indent=1) + "\n")
    temporary.replace(path)
    _table.cache_clear()
