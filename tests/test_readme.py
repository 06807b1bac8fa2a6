"""The Python of the README and of the documentation's pages runs, in order, as it stands."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if path.parent.name in ("docs", "howto") and "```python" in path.read_text()
)


def run_blocks(page: Path) -> dict[str, Any]:
    """The names that a page's blocks leave behind, one after the other."""
    names: dict[str, Any] = {"path": files("mla_jax") / "models" / "tiny"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_every_python_block_of_the_readme():
    names = run_blocks(ROOT / "README.md")
    assert names["made"].shape == (10, 2)  # the scan's ten steps of two rows
    assert names["cache"].lengths.tolist() == [5 + 20] * 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_of_the_documentation(page):
    """What a page claims it asserts itself."""
    run_blocks(page)


def test_pages_with_code():
    assert {"tour", "migration", "decode_loop", "checkpoint"} <= {page.stem for page in PAGES}
