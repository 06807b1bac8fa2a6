"""`mla-jax train-tiny`: the byte-level model that the package ships, from Python's own English."""

import argparse
import dataclasses
import json
import math
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import jax
from rich.console import Console

from mla_jax.bench.results import command
from mla_jax.checkpoint import save_checkpoint
from mla_jax.config import presets
from mla_jax.corpus import SEPARATOR, build_corpus
from mla_jax.training import Evaluation, Training, TrainingSettings


def add_parser(subparsers) -> None:
    p = subparsers.add_parser(
        "train-tiny",
        help="train the small byte-level model",
        description="Trains the preset 'tiny' on Python's reference topics and docstrings. Ctrl-C "
        "ends the training early and keeps the best model so far; a second one keeps nothing.",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    p.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="train on these UTF-8 files instead"
    )
    for name, kind, meaning in (
        ("steps", int, "steps of the optimizer"),
        ("batch", int, "windows a step"),
        ("length", int, "bytes a window"),
        ("learning_rate", float, "at its peak"),
        ("weight_decay", float, "of AdamW"),
        ("seed", int, "of the first parameters and the batches"),
    ):
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=getattr(TrainingSettings, name),
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    flags = vars(args)
    names = [field.name for field in dataclasses.fields(TrainingSettings) if field.name in flags]
    settings = TrainingSettings(**{name: flags[name] for name in names})
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"--out: {args.out} is not empty")

    text = build_corpus(args.text)
    training = Training(presets["tiny"], text, settings)
    console = Console(stderr=True, highlight=False)
    begun = time.perf_counter()
    with _first_interrupt() as interrupted:
        _train(training, interrupted, console)
        training.evaluate()
        seconds = time.perf_counter() - begun
    _write(out, training, _record(training, text, seconds, own_text=bool(args.text)))
    assert training.best is not None
    console.print(f"{_line(training.best)}, written to {args.out}", markup=False, soft_wrap=True)
    return 0 if training.done else 130


def _train(training: Training, interrupted: threading.Event, console: Console) -> None:
    """Train until done or interrupted, in calls of about a second, with a line an evaluation."""
    settings = training.settings
    count = shown = 0
    status = console.status("compiling") if console.is_terminal else nullcontext()
    with status as live:
        while not (training.done or interrupted.is_set()):
            first, begun = training.step, time.perf_counter()
            training.advance(max(count, 1))
            steps_per_second = (training.step - first) / (time.perf_counter() - begun)
            count = int(steps_per_second)
            rate = f"{steps_per_second * settings.batch * settings.length:,.0f} tokens/s"
            if live is not None:
                live.update(f"step {training.step}/{settings.steps}, {rate}")
            for evaluation in training.curve[shown:]:
                console.print(f"{_line(evaluation)}, {rate}")
            shown = len(training.curve)


def _line(evaluation: Evaluation) -> str:
    row = _row(evaluation)
    train = "-" if evaluation.train_loss is None else f"{evaluation.train_loss:.4f}"
    return (
        f"step {evaluation.step}: loss {train}, validation {evaluation.validation_loss:.4f} nats, "
        f"{row['validation_bits_per_byte']:.4f} bits per byte"
    )


def _row(evaluation: Evaluation) -> dict:
    return {
        "step": evaluation.step,
        "train_loss": evaluation.train_loss,
        "validation_loss": evaluation.validation_loss,
        "validation_bits_per_byte": evaluation.validation_loss / math.log(2),
    }


def _record(training: Training, text: bytes, seconds: float, *, own_text: bool) -> dict:
    """training.json: the loss curve, and what made it. Losses are in nats a byte."""
    assert training.best is not None
    return {
        "command": command(),
        "interrupted": not training.done,
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        },
        "corpus": {
            "source": "--text"
            if own_text
            else "Python's reference topics and docstrings (PSF-2.0)",
            "bytes": len(text),
            "documents": text.count(SEPARATOR) - 1,
        },
        "settings": dataclasses.asdict(training.settings),
        "config": dataclasses.asdict(training.config),
        "best": {**_row(training.best), "expert_loads": training.best.expert_loads},
        "curve": [_row(evaluation) for evaluation in training.curve],
    }


def _write(out: Path, training: Training, record: dict) -> None:
    """The checkpoint and its record, moved into the empty folder `out` at once."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        draft = Path(scratch, out.name)
        save_checkpoint(training.best_model("bfloat16"), draft)
        (draft / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(draft, out)


@contextmanager
def _first_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one raises KeyboardInterrupt as usual."""
    interrupted = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
