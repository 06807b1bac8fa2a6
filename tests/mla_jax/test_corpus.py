"""The corpus: readable, repeatable, and made of nothing but the sources it names."""

import re
import sysconfig

import pytest

from mla_jax.corpus import build_corpus, prose

LONG = "This sentence is here to be long enough to be kept."


@pytest.fixture(scope="module")
def corpus() -> bytes:
    return build_corpus()


@pytest.fixture(scope="module")
def paragraphs(corpus) -> list[str]:
    return [p for text in corpus.decode().split("\0")[1:-1] for p in text.split("\n\n")]


def test_size_and_documents(corpus):
    assert len(corpus) > 500_000
    assert corpus.startswith(b"\0")
    assert corpus.endswith(b"\0")
    assert b"\0\0" not in corpus


def test_is_plain_text(corpus, paragraphs):
    assert re.fullmatch(rb"[\x20-\x7e\n\0]+", corpus)
    assert not any("\n" in p for p in paragraphs)
    letters = sum(c.isalpha() or c == " " for p in paragraphs for c in p)
    assert letters > 0.95 * sum(map(len, paragraphs))


def test_paragraphs_are_sentences_without_markup(paragraphs):
    for paragraph in paragraphs:
        assert re.match(r"""["'(]?[A-Z]""", paragraph), paragraph
        assert re.search(r"""[.!?]["')]*$""", paragraph), paragraph
        assert not re.search(r">>>|::=|``|={4}|-{4}|\*{4}|  |:[a-z]+:`", paragraph), paragraph


def test_no_paragraph_comes_twice(paragraphs):
    assert len(set(paragraphs)) == len(paragraphs)


def test_is_the_same_each_time(corpus):
    assert build_corpus() == corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LONG.replace("sentence", "\u201csentence\u201d"), LONG.replace("sentence", '"sentence"')),
        (LONG.replace("sentence", "``sentence''"), LONG.replace("sentence", '"sentence"')),
        (LONG.replace(" be ", "\nbe "), LONG),
        (f"{LONG} It is comma-\nseparated.", f"{LONG} It is comma-separated."),
        (f"{LONG}  So, for\nexample::\n\n    f(x)", LONG),
        (f"See :func:`~os.open` or ``x`` and *y* [3]. {LONG}", f"See os.open or x and y. {LONG}"),
        (f"* {LONG}\n* {LONG}", LONG),
        ("1. " + LONG.replace(" be ", "\n   be "), LONG),
        (f"Heading\n=======\n\n{LONG}", LONG),
    ],
)
def test_prose_keeps(text, expected):
    kept = prose(text)
    assert kept
    assert all(expected in paragraph for paragraph in kept)


@pytest.mark.parametrize(
    "text",
    [
        f">>> print('{LONG}')\n{LONG}",
        "A heading of some length that has no end\n========================================",
        "+------+------+\n| Cell | Cell. |\n+------+------+",
        f".. note:: {LONG}",
        f":param x: {LONG}",
        f"@param x: {LONG}",
        "Function(argument=None, another=(1, 2, 3), third=4) -> Result of it.",
        'Stmt ::= "assert" expression and more of the grammar.',
        f"{LONG[:-1]} caf\u00e9.",
        "    x = compute(y)\n    return [x for x in range(100) if x % 2 == 0]",
        "Too short.",
        "",
    ],
)
def test_prose_drops(text):
    assert prose(text) == []


def test_reads_topics_and_docstrings_and_imports_nothing(tmp_path, monkeypatch):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    write("pydoc_data/topics.py", f"topics = {{'a': 'Short. {LONG}', 'b': '{LONG} {LONG}'}}")
    write("b.py", f'raise SystemExit\n\ndef f():\n    """Second one. {LONG}"""')
    write("a.py", f'"""First one. {LONG}\n\n{LONG} {LONG}"""')
    write("test/c.py", f'"""A test. {LONG}"""')
    write("site-packages/d.py", f'"""Not of the library. {LONG}"""')
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    texts = [f"{LONG} {LONG}", f"Short. {LONG}", f"First one. {LONG}", f"Second one. {LONG}"]
    assert build_corpus() == ("\0" + "".join(f"{text}\0" for text in texts)).encode()


def test_reads_files_as_they_are(tmp_path):
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_text("x = 1\n\n\u00e9", encoding="utf-8")
    second.write_text("y")
    assert build_corpus([first, second]) == b"\0x = 1\n\n\xc3\xa9\0y\0"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"a\0b", "zero byte"), (b"a\xff", "UTF-8")],
)
def test_refuses_what_is_not_text(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"text: .*{message}"):
        build_corpus([path])
    with pytest.raises(FileNotFoundError, match="absent"):
        build_corpus([tmp_path / "absent"])
