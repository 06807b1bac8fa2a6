"""English that every Python ships: the corpus of the byte-level model.

The text is Python's own, under the Python Software Foundation licence (PSF-2.0): the reference
topics behind `help()` (`pydoc_data.topics`) and the docstrings of the standard library. Sources
are parsed, never imported, so the corpus depends on the installed Python alone.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

SEPARATOR = b"\0"
"""Begins and ends every document: bos and eos of the byte-level model."""

# Tests and their fixtures, a text editor, demonstrations, and what is not the standard library.
_SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages")
)
_TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
    }
)
_BULLET = re.compile(r" *(?:[*+\u2022-]|\(?(?:\d+|[a-z])[.)]) +(?=\S)")
_NOT_PROSE = re.compile(r">>>|::=|^\.\. |^[:@|+]|==|->|\w\(\w+=")
# (pattern, what stays): TeX's quotes, roles and literals, emphasis, footnote marks, blanks.
_MARKUP = (
    (re.compile(r"``([^`']+)''"), r'"\1"'),
    (re.compile(r"`([^`']+)'"), r"'\1'"),
    (re.compile(r"(?::[\w:]+:)?(`{1,2})~?([^`]+)\1_{0,2}"), r"\2"),
    (re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*)\1(?![\w*])"), r"\2"),
    (re.compile(r" ?\[\d+\]"), ""),
    (re.compile(r" +"), " "),
)
_SENTENCES = re.compile(r"""["'(]?[A-Z].*[a-z)"'\]][.!?]["')]*(?= |$)""")


def build_corpus(paths: Iterable[Path] | None = None) -> bytes:
    """Documents of plain ASCII prose, each between two SEPARATORs (neighbours share one).

    None reads the standard library: a document a reference topic or source file, no paragraph
    twice, the same bytes on each call of one Python. `paths` reads those UTF-8 text files
    instead, each a document, as they are. Errors: OSError (file), ValueError (not text, empty).

    >>> build_corpus()[:1]
    b'\\x00'
    """
    documents = (
        standard_library_documents() if paths is None else [_read_text(Path(p)) for p in paths]
    )
    return SEPARATOR + b"".join(text.encode() + SEPARATOR for text in documents)


def standard_library_documents() -> Iterator[str]:
    """The prose of each topic, longest first, then of each source file, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for texts in (*_topics(root / "pydoc_data" / "topics.py"), *_docstrings(root)):
        fresh = []
        for paragraph in (found for text in texts for found in prose(text)):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        if fresh:
            yield "\n\n".join(fresh)


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that read as sentences, each on one line, without markup.

    Code, tables, headings, directives, signatures and lists of fields go, as does whatever
    follows the last whole sentence of a paragraph.

    >>> prose("Title\\n=====\\n\\nReturns the *first* of the items\\nthat match.  So::\\n\\n  f()")
    ['Returns the first of the items that match.']
    """
    found = []
    for lines in _blocks(text.translate(_TYPOGRAPHY).expandtabs()):
        paragraph = re.sub(r"(?<=[a-z])- (?=[a-z])(?!and |or )", "-", " ".join(lines))
        for pattern, kept in _MARKUP:
            paragraph = pattern.sub(kept, paragraph)
        sentences = _SENTENCES.match(paragraph)
        if sentences and _reads_well(sentences[0]) and not any(map(_NOT_PROSE.search, lines)):
            found.append(sentences[0])
    return found


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines of one indentation, stripped; a bullet begins a run, and is dropped."""
    block: list[str] = []
    indent = 0
    for line in (*text.splitlines(), ""):
        bullet = _BULLET.match(line)
        start = bullet.end() if bullet else len(line) - len(line.lstrip())
        content = line[start:].rstrip()
        if block and (not content or bullet or start != indent):
            yield block
            block = []
        if content:
            indent = start
            block.append(content)


def _reads_well(paragraph: str) -> bool:
    """Whether a paragraph is of some length, ASCII, mostly letters, and free of markup."""
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    plain = paragraph.isascii() and paragraph.isprintable() and "`" not in paragraph
    return plain and len(paragraph) >= 40 and letters >= 0.9 * len(paragraph)


def _topics(path: Path) -> list[list[str]]:
    """pydoc's topics, longest first: short ones often repeat a part of a long one."""
    if not path.exists():
        return []
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value).items()
            return [[text] for _, text in sorted(topics, key=lambda item: (-len(item[1]), item[0]))]
    return []


def _docstrings(root: Path) -> Iterator[list[str]]:
    """The docstrings of each source file, as they come in it."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            nodes = [node for node in ast.walk(_parse(path)) if isinstance(node, owners)]
            nodes.sort(key=lambda node: getattr(node, "lineno", 0))
            yield [ast.get_docstring(node) or "" for node in nodes]


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stray backslash in somebody's string
        return ast.parse(path.read_bytes())


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, byte {error.start}") from None
    if not text or "\0" in text:
        raise ValueError(f"{path}: {'has a zero byte' if text else 'empty'}, expected text")
    return text
