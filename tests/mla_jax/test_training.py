"""Training: the loss falls, the experts even out, the best model is what gets saved."""

import copy
import dataclasses
import functools
import json
import signal
import sys
from argparse import ArgumentParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import Decoder, MLAConfig, ModelConfig, MoEConfig, presets
from mla_jax.checkpoint import load_checkpoint, save_checkpoint
from mla_jax.cli import train_tiny
from mla_jax.nn.feed_forward import MoE
from mla_jax.training import HELD_OUT, Training, TrainingSettings, split_text

MINI = ModelConfig(
    vocab=128,
    n_layers=2,
    inter_dim=48,
    max_seq_len=32,
    mla=MLAConfig(
        dim=32,
        n_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        dtype="float32",
    ),
    moe=MoEConfig(
        n_routed=4, n_active=2, inter_dim=16, n_shared=1, score="sigmoid", normalize=True
    ),
)
# As few layers as possible: compilation takes most of the time here.
SHALLOW = dataclasses.replace(MINI, n_layers=1)
SOFTMAX = dataclasses.replace(SHALLOW, moe=MoEConfig(n_routed=4, n_active=2, inter_dim=16))


def some_settings(**changes) -> TrainingSettings:
    values = {"steps": 30, "batch": 8, "length": 16, "learning_rate": 1e-2, "evaluate_every": 12}
    return TrainingSettings(**{**values, **changes})


@functools.cache
def words(seed: int) -> bytes:
    some = ["latent", "attention", "pages", "a", "cache", "of", "the", "decoder", "reads"]
    return " ".join(np.random.default_rng(seed).choice(some, 800)).encode()


@functools.cache
def _compiled_once(seed: int) -> Training:
    return Training(MINI, words(seed), some_settings(seed=seed, balance_rate=0.25))


def begin(seed: int) -> Training:
    """A run at its first step. All share what is compiled, none the state that steps use up."""
    training = copy.copy(_compiled_once(seed))
    training.curve, training._losses = [], []
    training._state = jax.tree.map(jnp.copy, training._state)
    return training


@functools.cache
def _trained_once(seed: int) -> Training:
    training = begin(seed)
    training.evaluate()
    while not training.done:
        training.advance(7)
    return training


@pytest.fixture
def text(seed) -> bytes:
    return words(seed)


@pytest.fixture
def trained(seed) -> Training:
    return _trained_once(seed)


def cross_entropy(model: Decoder, windows: np.ndarray) -> float:
    """Nats a byte, in float64."""
    logits = np.asarray(model(jnp.asarray(windows[:, :-1], jnp.int32)), np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    right = np.take_along_axis(logits, windows[:, 1:, None].astype(np.int64), -1)[..., 0]
    return float((log_sum - right).mean())


def test_the_loss_falls(trained):
    assert [point.step for point in trained.curve] == [0, 12, 24, 30]
    losses = [point.validation_loss for point in trained.curve]
    assert losses[-1] < losses[0] - 1
    assert trained.curve[-1].train_loss < trained.curve[1].train_loss


def test_the_best_model_has_the_loss_reported(trained, text):
    _, held_out = split_text(text, 17)
    assert trained.best.validation_loss == min(p.validation_loss for p in trained.curve)
    loss = cross_entropy(trained.best_model("float32"), held_out)
    assert loss == pytest.approx(trained.best.validation_loss, rel=1e-4)


def test_expert_loads_are_shares(trained):
    for point in trained.curve:
        assert len(point.expert_loads) == 2
        for load in point.expert_loads:
            assert len(load) == 4
            assert sum(load) == pytest.approx(1, abs=1e-5)


def test_a_worse_step_is_not_kept(trained):
    later = copy.copy(trained)
    later.curve, later.step = list(trained.curve), trained.step + 1
    state = trained._state
    later._state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    later.evaluate()
    assert later.curve[-1].validation_loss == pytest.approx(np.log(MINI.vocab), rel=1e-5)
    assert later.best is trained.best
    np.testing.assert_array_equal(
        later.best_model("float32").embed[...], trained.best_model("float32").embed[...]
    )


def test_a_loss_that_is_not_finite_is_an_error(trained):
    later = copy.copy(trained)
    later.step = trained.step + 1
    state = trained._state
    later._state = state._replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    with pytest.raises(ValueError, match=r"^learning_rate: got 0\.01, but by step 31 the loss"):
        later.evaluate()


def test_biases_move_towards_an_even_load(seed):
    """One step, against the choices of the first model, worked out layer by layer."""
    training = begin(seed)
    first, rate = training.best_model("float32"), training.settings.balance_rate
    tokens = training._sample(jnp.int32(0), training._text)[:, :-1].astype(jnp.int32)
    training.advance(1)
    biases = [bias for _, bias in nnx.to_flat_state(training._state.biases)]
    x = first.embed[...][tokens]
    for layer, bias in zip(first.layers, biases, strict=True):
        assert isinstance(layer.ffn, MoE)
        hidden = layer.ffn_norm(x + layer.attn(layer.attn_norm(x)))
        ids, _ = layer.ffn.router(hidden.reshape(-1, MINI.mla.dim))
        loads = np.bincount(np.asarray(ids).ravel(), minlength=4)
        np.testing.assert_array_equal(bias[...], rate * np.sign(loads.mean() - loads))
        x = layer(x)


def test_calls_may_be_cut_anywhere(trained, seed):
    training = begin(seed)
    for count in (1, 5, 30, 2, 10, 30):
        training.advance(count)
    assert training.done
    for one, other in zip(*(jax.tree.leaves(t._state) for t in (trained, training)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_softmax_routers_have_no_bias_to_move(text):
    training = Training(SOFTMAX, text, some_settings(steps=2, batch=2, evaluate_every=2))
    training.advance(1)
    assert jax.tree.leaves(training._state.biases) == []
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(training._state.params))


def test_split_holds_out_one_window_in_fifty():
    count = 3 * HELD_OUT + 1
    text = bytes(range(128)) * 50
    text = text[: 10 * count + 3]
    train, held_out = split_text(text, 10)
    starts = range(0, count, HELD_OUT)
    assert [row.tobytes() for row in held_out] == [text[10 * i : 10 * i + 10] for i in starts]
    kept = b"".join(text[10 * i : 10 * i + 10] for i in range(count) if i % HELD_OUT)
    assert train.tobytes() == kept + text[-3:]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", -1),
        ("length", 0),
        ("evaluate_every", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("clip_norm", float("inf")),
        ("weight_decay", -0.1),
        ("seed", -1),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got {value}, expected"):
        some_settings(**{field: value})


@pytest.mark.parametrize(
    ("bad_text", "length", "message"),
    [
        (b"short", 16, r"text: got 5 bytes, expected two windows of 17"),
        (b"\xff" * 100, 16, r"text: got byte 255"),
        (b"a" * 100, 33, r"length: got 33, expected at most"),
    ],
)
def test_bad_text(bad_text, length, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Training(MINI, bad_text, some_settings(length=length))


def test_says_that_optax_is_missing(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match=r"mla-jax\[train\]"):
        Training(MINI, text, some_settings())


def test_the_shipped_model_stays_below_4_mb(tmp_path):
    config = presets["tiny"].replace_dtype("bfloat16")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), nnx.state(model)))
    save_checkpoint(model, tmp_path / "tiny")
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").iterdir()) < 3_980_000


def run(out: Path, *flags: str) -> int:
    parser = ArgumentParser()
    train_tiny.add_parser(parser.add_subparsers())
    args = parser.parse_args(["train-tiny", "--out", str(out), *flags])
    return args.run(args)


@pytest.fixture
def text_file(tmp_path, text, monkeypatch) -> str:
    monkeypatch.setitem(presets, "tiny", SHALLOW)
    (tmp_path / "text.txt").write_bytes(text)
    return str(tmp_path / "text.txt")


def test_command_writes_a_checkpoint_and_its_record(tmp_path, text_file, text, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(
        train_tiny, "Training", lambda *args: runs.append(Training(*args)) or runs[0]
    )
    out = tmp_path / "new" / "out"
    flags = ("--text", text_file, "--steps", "3", "--batch", "2", "--length", "16")
    assert run(out, *flags) == 0
    names = {"config.json", "model.safetensors", "training.json"}
    assert {file.name for file in out.iterdir()} == names
    assert list(out.parent.iterdir()) == [out]

    loaded, best = load_checkpoint(out), runs[0].best_model("bfloat16")
    tokens = jnp.asarray(np.frombuffer(text[:40], np.uint8)[None], jnp.int32)
    np.testing.assert_array_equal(loaded(tokens), best(tokens))

    record = json.loads((out / "training.json").read_text())
    assert record["interrupted"] is False
    assert record["settings"]["steps"] == 3
    assert record["corpus"]["bytes"] == len(text) + 2
    assert [point["step"] for point in record["curve"]] == [3]
    best_bits = record["best"]["validation_bits_per_byte"]
    assert best_bits == pytest.approx(record["best"]["validation_loss"] / np.log(2))
    assert f"{best_bits:.4f} bits per byte" in capsys.readouterr().err


def test_first_interrupt_keeps_what_there_is(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda *_: signal.raise_signal(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    assert run(tmp_path / "out", "--text", text_file, "--length", "16") == 130
    assert json.loads((tmp_path / "out" / "training.json").read_text())["interrupted"] is True
    load_checkpoint(tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_interrupt_writes_nothing(tmp_path, text_file, monkeypatch):
    def twice(*_) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "advance", twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "--text", text_file, "--length", "16")
    assert list((tmp_path / "out").iterdir()) == []


def test_command_refuses(tmp_path, text_file):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"^--out: .*full is not empty$"):
        run(tmp_path / "full", "--text", text_file)
    with pytest.raises(FileExistsError, match=r"text\.txt"):
        run(Path(text_file), "--text", text_file)
    with pytest.raises(FileNotFoundError, match="absent"):
        run(tmp_path / "out", "--text", "absent")
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        run(tmp_path / "out", "--steps", "0")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "out", "--steps", "many")
