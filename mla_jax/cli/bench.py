"""`mla-jax bench`: measure on the present device, and write a results file."""

import argparse
from pathlib import Path


def _batches(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected positive integers")
    return values


def add_parser(subparsers) -> None:
    p = subparsers.add_parser("bench", help="measure kernels and steps on this device")
    kinds = p.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    step = kinds.add_parser(
        "decode-step", help="ms a token of a model with random weights, beside its floor"
    )
    step.add_argument("--preset", default="deepseek-v2-lite")
    step.add_argument("--batch", type=_batches, default=[1, 32, 128], metavar="N,N,…")
    step.add_argument("--length", type=int, default=1024, help="tokens each row has cached")
    step.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    step.set_defaults(run=run_decode_step)


def run_decode_step(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mla_jax.bench import decode_step, results
    from mla_jax.cli import find_preset

    config = find_preset(args.preset)
    if args.length < 1:
        raise ValueError(f"length: got {args.length}, expected at least 1")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"json: {args.json.parent} is not a folder")
    console = Console()

    def report(row: dict) -> None:
        numbers = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("op", "shape")
        )
        line = f"{row['op']:12} {row['shape']:28} {'  '.join(numbers)}"
        console.print(line, soft_wrap=True, highlight=False)

    ceilings, rows = decode_step.run(config, args.batch, args.length, report)
    if args.json is not None:
        results.write(args.json, rows, preset=args.preset, ceilings=ceilings)
    return 0
