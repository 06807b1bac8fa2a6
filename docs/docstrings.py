"""The library's docstrings, which are plain text, as reStructuredText for autodoc."""

import re
from typing import Any


def _paragraph(lines: list[str]) -> list[str]:
    """A paragraph: examples as they are, what is indented word for word, the rest as prose."""
    if lines[0].lstrip().startswith(">>>"):
        return [line.strip() if line.strip().startswith((">>>", "...")) else line for line in lines]
    if any(line.startswith(" ") for line in lines):
        return ["::", "", *("    " + line for line in lines)]
    # Between backticks stands code; elsewhere nothing is markup.
    prose = re.split(r"`([^`]*)`", "\n".join(lines))
    for i in range(0, len(prose), 2):
        prose[i] = re.sub(r"([*|_\\])", r"\\\1", prose[i])
    prose[1::2] = [f"``{code}``" for code in prose[1::2]]
    return "".join(prose).split("\n")


def converted(lines: list[str]) -> list[str]:
    """A docstring's lines."""
    made: list[str] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            made += [*_paragraph(paragraph), ""]
            paragraph = []
    return made


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """For Sphinx's event autodoc-process-docstring."""
    lines[:] = converted(lines)


def sign(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """For Sphinx's event autodoc-process-signature: arrays by the name that users import."""
    return tuple(
        text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns)
    )  # pyright: ignore[reportReturnType]
