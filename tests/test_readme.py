"""The README's Python runs, in order, as it stands."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {"path": files("mla_jax") / "models" / "tiny"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["made"].shape == (10, 2)  # the scan's ten steps of two rows
    assert names["cache"].lengths.tolist() == [5 + 20] * 2
