"""Text to tokens and back."""

import dataclasses

import pytest
import tokenizers

from mla_jax import presets
from mla_jax.tokenizer import ByteTokenizer, load_tokenizer


def test_bytes_round_trip_after_the_begin_token():
    tokenizer = ByteTokenizer(0)
    tokens = tokenizer.encode("naïve ✓")
    assert tokens[0] == 0
    assert tokens[1:] == list("naïve ✓".encode())
    assert tokenizer.decode(tokens[1:]) == "naïve ✓"
    assert tokenizer.decode([0xE2, 0x9C]) == "\N{REPLACEMENT CHARACTER}"


def test_a_checkpoint_brings_its_own(tmp_path):
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    own = tokenizers.Tokenizer(words)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, presets["tiny"])
    assert tokenizer.encode("b a z") == [1, 0, 2]
    assert tokenizer.decode([0, 1]) == "a b"


def test_no_tokenizer_and_no_bytes(tmp_path):
    config = dataclasses.replace(presets["tiny"], vocab=300)
    with pytest.raises(ValueError, match=r"tokenizer\.json: missing, and a vocabulary of 300"):
        load_tokenizer(tmp_path, config)


def test_a_broken_tokenizer_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path, presets["tiny"])
