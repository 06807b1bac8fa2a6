"""The results files: what was measured, with what, on what."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


def _commit() -> str:
    """The measured commit: git's, or MLA_JAX_COMMIT where the tree travels without history."""
    if commit := os.environ.get("MLA_JAX_COMMIT"):
        return commit
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return asked.stdout.strip() if asked.returncode == 0 else "unknown"


def command() -> str:
    """This process's command, without the folders of its files: they are nobody else's."""
    words = [word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["mla-jax", *words])


def header() -> dict[str, Any]:
    """Command, versions, device and commit of this process."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    device = jax.devices()[0]
    return {
        "command": command(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "device": device.device_kind,
        "commit": _commit(),
    }


def write(path: Path, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write a results file whole: to a neighbour first, then renamed."""
    document = {**header(), **extra, "rows": rows}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
