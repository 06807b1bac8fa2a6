"""The results files: what was measured, with what, on what."""

import contextlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
PEER_PACKAGES = ("torch", "sgl-flash-mla")


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


def _versions() -> dict[str, str]:
    """What runs, and the peers' packages where they are installed."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in PEER_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def header() -> dict[str, Any]:
    """Command, versions, device and commit of this process."""
    device = jax.devices()[0]
    return {
        "command": command(),
        "versions": _versions(),
        "python": sys.version.split()[0],
        "device": device.device_kind,
        "commit": _commit(),
    }


def document(rows: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    """What a results file holds."""
    return {**header(), **extra, "rows": rows}


def write(path: Path, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write a results file whole: to a neighbour first, then renamed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document(rows, **extra), indent=1) + "\n")
    temporary.replace(path)
