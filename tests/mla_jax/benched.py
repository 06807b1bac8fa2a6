"""What the tests of `mla-jax bench` share."""

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]


def assert_refused(run: Run, argv: list[str], words: str) -> None:
    """Status 2 and one line with these words, before anything is measured."""
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
