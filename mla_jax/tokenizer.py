"""Text to tokens and back: a checkpoint's `tokenizer.json`, or plain bytes."""

from pathlib import Path
from typing import Protocol

import tokenizers

from mla_jax.config import ModelConfig


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """One token a UTF-8 byte, after the model's begin token; what is not UTF-8 shows as U+FFFD."""

    def __init__(self, bos_id: int | None) -> None:
        self._prefix = [] if bos_id is None else [bos_id]

    def encode(self, text: str) -> list[int]:
        return self._prefix + list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)


def load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`; bytes if it has none and its vocabulary is 256.

    Errors: ValueError where there is neither.
    """
    file = path / "tokenizer.json"
    if file.exists():
        return FileTokenizer(file)
    if config.vocab == 256:
        return ByteTokenizer(config.bos_id)
    raise ValueError(f"{file}: missing, and a vocabulary of {config.vocab} is not bytes")
