"""`mla-jax bench`: measure on the present device, and write a results file."""

import argparse
from collections.abc import Iterable
from pathlib import Path

PAGED = """\
Times paged decode attention beside its peers, at DeepSeek's widths in bfloat16: 20 calls in one
compiled program, bursts of ours and of the peer's in turns.

flash-mla is FlashMLA's Hopper kernel (torch, and PyPI's sgl-flash-mla with --no-deps); torch then
needs GPU memory beside JAX: set XLA_PYTHON_CLIENT_MEM_FRACTION=.6 in the environment. xla is
attention without a kernel: gather, two products and a softmax."""


PREFILL = """\
Times prefill attention of one request in bfloat16: the expanded form (causal), forward and
backward, at DeepSeek's widths, and the absorbed form over pages.

cudnn is JAX's own call of cuDNN, with padded values; xla is attention without a kernel, where its
scores fit; reference is our own in plain JAX, a block of scores at a time."""


def positive_integers(text: str) -> list[int]:
    """An argument such as 1,32,128."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected positive integers")
    return values


def names(text: str) -> list[str]:
    """An argument such as flash-mla,xla."""
    return [part.strip() for part in text.split(",")]


def add_parser(subparsers) -> None:
    p = subparsers.add_parser("bench", help="measure kernels and steps on this device")
    kinds = p.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    step = kinds.add_parser(
        "decode-step", help="ms a token of a model with random weights, beside its floor"
    )
    step.add_argument("--preset", default="deepseek-v2-lite")
    step.add_argument("--batch", type=positive_integers, default=[1, 32, 128], metavar="N,N,…")
    step.add_argument("--length", type=int, default=1024, help="tokens each row has cached")
    step.set_defaults(run=run_decode_step)
    paged = kinds.add_parser(
        "paged",
        help="paged decode attention beside FlashMLA and XLA",
        description=PAGED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    paged.add_argument(
        "--against",
        type=names,
        metavar="NAME,NAME",
        help="flash-mla, xla (default: those that can run here)",
    )
    paged.add_argument(
        "--deterministic",
        action="store_true",
        help="time the mode whose results do not depend on the rest of the batch",
    )
    paged.add_argument("--plot", type=Path, metavar="FILE", help="draw the results here, an SVG")
    paged.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="instead of timing, trace what the warpgroups of the Mosaic GPU kernel wait for",
    )
    paged.set_defaults(run=run_paged)
    prefill = kinds.add_parser(
        "prefill",
        help="prefill attention, expanded and absorbed, beside cuDNN and XLA",
        description=PREFILL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prefill.set_defaults(run=run_prefill)
    schedules = kinds.add_parser(
        "schedule", help="make the megakernel's schedules (on the host), and draw one"
    )
    schedules.add_argument("--picture", metavar="NAME", help="print this shape's timeline")
    schedules.set_defaults(run=run_schedule)
    for kind, example in ((paged, "B128-h16-s4096"), (prefill, "h16-t8192")):
        kind.add_argument(
            "--shapes",
            type=names,
            default=["all"],
            metavar="NAME,…",
            help=f"by name, such as {example} (default: all; a wrong name lists them)",
        )
        kind.add_argument("--backend", metavar="NAME", help="of ours (default: fastest)")
    for kind in (step, paged, prefill, schedules):
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def _check_folder(name: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{name}: {path.parent} is not a folder")


def _report(row: dict) -> None:
    """One row, on one line."""
    from rich.console import Console

    numbers = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("op", "shape")
    )
    line = f"{row['op']:12} {row['shape']:28} {'  '.join(numbers)}"
    Console().print(line, soft_wrap=True, highlight=False)


def _record(measured: Iterable[dict], ceilings: dict[str, float], path: Path | None) -> list[dict]:
    """Report rows as they come, and write all so far: what is measured stays, whatever comes."""
    from mla_jax.bench import results

    rows: list[dict] = []
    for row in measured:
        rows.append(row)
        _report(row)
        if path is not None:
            results.write(path, rows, ceilings=ceilings)
    return rows


def run_decode_step(args: argparse.Namespace) -> int:
    from mla_jax.bench import decode_step, results
    from mla_jax.cli import find_preset

    config = find_preset(args.preset)
    if args.length < 1:
        raise ValueError(f"length: got {args.length}, expected at least 1")
    _check_folder("json", args.json)
    ceilings, rows = decode_step.run(config, args.batch, args.length, _report)
    if args.json is not None:
        results.write(args.json, rows, preset=args.preset, ceilings=ceilings)
    return 0


def run_schedule(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mla_jax.bench import schedules

    if args.picture is not None and args.picture not in schedules.SHAPES:
        raise ValueError(
            f"picture: got {args.picture!r}, expected one of {', '.join(schedules.SHAPES)}"
        )
    _check_folder("json", args.json)
    if args.picture is not None:
        plan = schedules.schedule(*schedules.SHAPES[args.picture])
        Console().print(schedules.picture(plan), soft_wrap=True)
        return 0
    _record(schedules.run(), {}, args.json)
    return 0


def run_paged(args: argparse.Namespace) -> int:
    from mla_jax.bench import paged, peers, plot, results, timing

    # Mistakes first: measuring takes minutes.
    shapes = paged.find_shapes(None if args.shapes == ["all"] else args.shapes)
    if args.profile is not None:
        return _profile(shapes, args.profile)
    against = peers.find_peers(args.against)
    for shape in shapes:
        paged.backend_for(shape, args.backend)
    _check_folder("json", args.json)
    if args.plot is not None:
        _check_folder("plot", args.plot)
        plot.check(args.plot)

    ceilings = timing.measure_ceilings()
    options = {"backend": args.backend, "deterministic": args.deterministic}
    programs = paged.compile_ahead(shapes, **options)
    rows = _record(
        (
            row
            for shape in shapes
            for row in paged.bench_shape(shape, against, ceilings, **options, programs=programs)
        ),
        ceilings,
        args.json,
    )
    means = paged.geometric_means(rows)
    for peer, mean in means.items():
        print(f"geometric mean of the ratios to {peer}: {mean:.3f}")
    if args.json is not None:
        results.write(args.json, rows, ceilings=ceilings, geometric_means=means)
    if args.plot is not None:
        plot.draw(results.document(rows, ceilings=ceilings), args.plot)
    return 0


def _profile(shapes: Iterable, folder: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from mla_jax.bench import profile

    if not folder.is_dir():
        raise ValueError(f"profile: {folder} is not a folder")
    profile.check()
    for shape in shapes:
        trace, stages = profile.profile(shape, folder)
        table = Table("warpgroup", "stage", title=f"{shape.name}, thousands of clocks: {trace}")
        for column in ("times", "median", "longest", "total"):
            table.add_column(column, justify="right")
        for stage in stages:
            numbers = (f"{number:.2f}" for number in stage[3:])
            table.add_row(stage.role, stage.name, str(stage.count), *numbers)
        Console().print(table)
    return 0


def run_prefill(args: argparse.Namespace) -> int:
    from mla_jax.bench import prefill, timing

    shapes = prefill.find_shapes(None if args.shapes == ["all"] else args.shapes)
    for shape in shapes:
        prefill.backend_for(shape, args.backend)
    _check_folder("json", args.json)

    ceilings = timing.measure_ceilings()
    _record(
        (
            row
            for shape in shapes
            for row in prefill.bench_shape(shape, ceilings, backend=args.backend)
        ),
        ceilings,
        args.json,
    )
    return 0
