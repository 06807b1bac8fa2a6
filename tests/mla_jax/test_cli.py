"""The command line as a user meets it: text, JSON, and one line for every mistake."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import jax
import pytest
from interpreted import MOSAIC_GPU
from lowered import A100, H200

from mla_jax import load_checkpoint
from mla_jax.cli.main import main

TINY = Path(str(files("mla_jax") / "models" / "tiny"))


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        status = main(list(argv))
    except SystemExit as exit_:  # argparse's own refusals
        status = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_writes_text_and_its_progress(capsys):
    status, out, err = run(
        capsys, "generate", "--prompt", "The list", "--prompt", "A", "--max-new-tokens", "40"
    )
    assert status == 0
    assert "[0] The list" in out
    assert "[1] A" in out
    assert "tokens/s" in err
    assert "cache pages in use" in err


def test_one_prompt_streams_without_a_number(capsys):
    status, out, _ = run(capsys, "generate", "--prompt", "The list", "--max-new-tokens", "40")
    assert status == 0
    assert out.startswith("The list")
    assert out.endswith("\n")


def test_json(capsys):
    status, out, _ = run(
        capsys,
        *("generate", "--json", "--ignore-eos", "--max-new-tokens", "33"),
        *("--prompt", "The list", "--prompt", "Return"),
    )
    document = json.loads(out)
    assert status == 0
    assert [s["prompt"] for s in document["sequences"]] == ["The list", "Return"]
    for sequence in document["sequences"]:
        assert len(sequence["tokens"]) == 33
        assert sequence["finish"] == "length"
        assert sequence["text"] == bytes(sequence["tokens"]).decode(errors="replace")
    assert document["tokens"] == 66


def test_the_shipped_model_writes_english(capsys):
    """Most of its words are words of the text it learned: a broken weight makes noise."""
    import pydoc_data.topics

    _, out, _ = run(
        capsys, "generate", "--json", "--max-new-tokens", "300", "--prompt", "The object"
    )
    known = set(" ".join(pydoc_data.topics.topics.values()).lower().split())
    words = json.loads(out)["sequences"][0]["text"].lower().split()[:-1]
    assert len(words) > 20
    assert sum(word in known for word in words) / len(words) > 0.6


def test_shipped_model_is_small_and_whole():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 4_000_000
    assert load_checkpoint(TINY).config.moe is not None
    assert json.loads((TINY / "training.json").read_text())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", "--max-new-tokens", "-3"], "got -3, expected at least 1"),
        (["generate", "--temperature", "-1"], "temperature: got -1.0"),
        (["generate", "--top-p", "0"], "top_p: got 0.0"),
        (["generate", "--top-p", "1.1"], "top_p: got 1.1"),
        (["generate", "--top-k", "0"], "got 0, expected at least 1"),
        (["generate", "--backend", "cuda"], "backend: got 'cuda'"),
        (["generate", "--checkpoint", "/no/such/folder"], "/no/such/folder"),
        (["generate", "--num-pages", "1", "--prompt", "a", "--prompt", "b"], "out of pages"),
        (["generate", "--prompt", "a" * 3000], "expected at most 2048"),
        (["doctor", "--preset", "gpt"], "preset: got 'gpt'"),
        (["bench", "decode-step", "--preset", "gpt"], "preset: got 'gpt'"),
        (["bench", "decode-step", "--json", "/no/such/folder/x.json"], "is not a folder"),
        (["bench", "prefill", "--json", "/no/such/folder/x.json"], "is not a folder"),
        (["tune"], "tune: needs a GPU"),
        (["polish"], "invalid choice: 'polish'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_a_truncated_checkpoint_is_one_line(capsys, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(TINY, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, out, err = run(capsys, "generate", "--checkpoint", str(folder))
    assert (status, out) == (2, "")
    assert "model.safetensors" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("preset", "mesh", "backend"),
    [
        ("deepseek-v2-lite", H200, "triton"),  # 16 heads
        ("deepseek-v3", H200, "mosaic_gpu" if MOSAIC_GPU else "triton"),  # 128 heads
        ("deepseek-v3", A100, "triton"),
    ],
)
def test_doctor_names_what_a_call_gets(capsys, preset, mesh, backend):
    with jax.sharding.use_abstract_mesh(mesh):
        _, out, _ = run(capsys, "doctor", "--json", "--preset", preset)
    operations = json.loads(out)["operations"]
    assert operations["paged_decode"]["runs"] == backend
    assert operations["paged_prefill"]["runs"] == "triton"


def test_doctor_names_what_a_model_with_an_indexer_gets(capsys):
    with jax.sharding.use_abstract_mesh(H200):
        reports = [
            json.loads(run(capsys, "doctor", "--json", "--preset", f"deepseek-{name}")[1])
            for name in ("v3", "v3.2")
        ]
    plain, indexed = (report["operations"] for report in reports)
    assert indexed.pop("token_sparse")["runs"] == "triton"
    assert indexed == plain


def test_doctor_names_the_backends_and_the_reasons(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    decode = report["operations"]["paged_decode"]
    assert status == 0
    assert decode["runs"] == "reference"
    assert decode["not"]["triton"].startswith("needs a GPU")
    assert decode["not"]["mosaic_gpu"].startswith("needs a Hopper GPU")
    assert report["versions"]["jax"]
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "paged_decode" in out
