"""`mla-jax bench`: measure on the present device, and write a results file."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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


SPARSE = """\
Times token-sparse decode attention at DeepSeek's widths, over a cache in bfloat16 and in fp8 of 656
bytes a token.

flash-mla is FlashMLA's sparse kernel over the fp8 cache, as in `bench paged`; reference is our own
in plain JAX, which gathers the listed tokens."""


MEGAKERNEL = """\
Times decoding by a schedule, in bfloat16 with 16 and 8 heads: one launch (megakernel), one with a
global queue (megakernel-global), a launch for each level (triton), beside our split-KV decode and
the peers of `bench paged`. makespan_us is what the schedule's cost model promises, with the costs
of `mla-jax tune megakernel` where it has run, and over_makespan the measured time over that."""


FP8 = """\
Times paged decode attention over float8_e4m3fn caches, of 656 bytes a token (layout slot) and 576
(tensor), beside ours and FlashMLA's over the same tokens in bfloat16; as `bench paged`."""


GROUPED = """\
Times grouped-query attention (mla_jax.flash_mla) in bfloat16: decode over pages of 64, beside the
rate of a copy, and prefill over all keys, causal, and over a quarter of the blocks.

cudnn and xla are jax.nn.dot_product_attention, where it compiles: in decode over pages that it
gathers first, and, contiguous, over keys that lie side by side already. dense is our own over all
keys. alone_us is one call as a program of its own, its plan and launch included."""


SHARDED = """\
Times many devices beside one (the greatest power of two of those here): the sum over all of them by
its size; DeepSeek-V3's attention with its heads over all devices beside a device's share alone, and
a layer of it, sums included; one request's attention over a cache that all devices share; decode
steps of DeepSeek-V2-Lite with random weights on 1, 2, 4 … devices."""


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
    as_written = argparse.RawDescriptionHelpFormatter

    def described(name: str, description: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(
            name, help=text, description=description, formatter_class=as_written
        )

    step = kinds.add_parser(
        "decode-step", help="ms a token of a model with random weights, beside its floor"
    )
    step.add_argument("--preset", default="deepseek-v2-lite")
    step.add_argument("--batch", type=positive_integers, default=[1, 32, 128], metavar="N,N,…")
    step.add_argument("--length", type=int, default=1024, help="tokens each row has cached")
    step.set_defaults(run=run_decode_step)
    paged = described("paged", PAGED, "paged decode attention beside FlashMLA and XLA")
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
    paged.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="instead of timing, trace what the warpgroups of the Mosaic GPU kernel wait for",
    )
    paged.set_defaults(run=run_paged)
    prefill = described(
        "prefill", PREFILL, "prefill attention, expanded and absorbed, beside cuDNN and XLA"
    )
    prefill.set_defaults(run=run_prefill)
    sparse = described(
        "sparse", SPARSE, "token-sparse decode attention beside FlashMLA's fp8 kernel"
    )
    sparse.set_defaults(run=run_sparse)
    fp8 = described("fp8", FP8, "paged decode attention over fp8 caches beside bfloat16 ones")
    fp8.set_defaults(run=run_fp8)
    grouped = described(
        "grouped", GROUPED, "grouped-query decode and block-sparse prefill beside JAX's attention"
    )
    grouped.set_defaults(run=run_grouped)
    schedules = kinds.add_parser(
        "schedule", help="make the megakernel's schedules (on the host), and draw one"
    )
    schedules.add_argument("--picture", metavar="NAME", help="print this shape's timeline")
    schedules.set_defaults(run=run_schedule, plot=None)
    megakernel = described(
        "megakernel", MEGAKERNEL, "decode by a schedule beside split-KV decode and FlashMLA"
    )
    megakernel.set_defaults(run=run_megakernel)
    sharded = described("sharded", SHARDED, "many devices beside one, and the link between them")
    sharded.add_argument(
        "--only", type=names, metavar="NAME,…", help="some of link, heads, context, steps"
    )
    sharded.set_defaults(run=run_sharded)
    report = kinds.add_parser(
        "report", help="the tables of results files as Markdown, or those of a document anew"
    )
    report.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="(default: those of the package)"
    )
    report.add_argument(
        "--update",
        type=Path,
        metavar="FILE",
        help="a Markdown document: every row of its tables of results as the files have it",
    )
    report.set_defaults(run=run_report)
    megakernel.add_argument(
        "--against", type=names, metavar="NAME,NAME", help="as of `bench paged`"
    )
    examples = {
        **{paged: "B128-h16-s4096", prefill: "h16-t8192", sparse: "B128-h128-k2048"},
        fp8: "B128-h16-s8192",
        grouped: "B64-h32-kv8-d128-s4096",
        megakernel: "B1-s65536-n1",
    }
    for kind, example in examples.items():
        kind.add_argument(
            "--shapes",
            type=names,
            default=["all"],
            metavar="NAME,…",
            help=f"by name, such as {example} (default: all; a wrong name lists them)",
        )
        kind.add_argument("--backend", metavar="NAME", help="of ours (default: fastest)")
    for kind in (step, paged, prefill, sparse, fp8, grouped, schedules, megakernel, sharded):
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    for kind in (step, paged, prefill, sparse, fp8, grouped, megakernel, sharded):
        kind.add_argument(
            "--plot", type=Path, metavar="FILE", help="draw the results here, .svg or .png"
        )


def _check_outputs(args: argparse.Namespace) -> None:
    """Mistakes in --json and --plot, before anything is measured."""
    from mla_jax.bench import plot

    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: {path.parent} is not a folder")
    if args.plot is not None:
        plot.check(args.plot)


def _line(row: dict) -> str:
    """One row, on one line."""
    numbers = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("op", "shape")
    )
    return f"{row['op']:12} {row['shape']:28} {'  '.join(numbers)}"


def _record(
    jobs: Sequence[Iterable[dict]], args: argparse.Namespace, *, sharded: bool = False, **extra: Any
) -> list[dict]:
    """Show rows as jobs measure them, below a bar of the jobs that are done, and draw them.

    After each row all so far are written, marked as partial until the last: what is measured stays,
    whatever comes. extra: what the file holds besides.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mla_jax.bench import plot, results

    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict] = []
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        for job in progress.track(jobs, description="measuring"):
            for row in job:
                rows.append(row)
                console.print(_line(row), soft_wrap=True, highlight=False, markup=False)
                if args.json is not None:
                    results.write(args.json, rows, **extra, partial=True)
    if args.json is not None:
        results.write(args.json, rows, **extra)
    if args.plot is not None:
        draw = plot.draw_sharded if sharded else plot.draw
        draw(results.document(rows, **extra), args.plot)
    return rows


def run_decode_step(args: argparse.Namespace) -> int:
    from mla_jax.bench import decode_step, timing
    from mla_jax.cli import find_preset

    config = find_preset(args.preset)
    if args.length < 1:
        raise ValueError(f"length: got {args.length}, expected at least 1")
    _check_outputs(args)
    ceilings = timing.measure_ceilings()
    jobs = decode_step.run(config, args.batch, args.length, ceilings["bandwidth_gb_s"])
    _record(jobs, args, preset=args.preset, ceilings=ceilings)
    return 0


def run_report(args: argparse.Namespace) -> int:
    from mla_jax.bench import report

    if args.update is not None:
        args.update.write_text(report.updated(args.update.read_text()))
        return 0
    sources = args.files or report.names()
    documents = {Path(source).stem: report.read(source) for source in sources}
    print("\n".join(report.markdown(*named) for named in documents.items()))
    return 0


def run_schedule(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mla_jax.bench import schedules

    if args.picture is not None and args.picture not in schedules.SHAPES:
        raise ValueError(
            f"picture: got {args.picture!r}, expected one of {', '.join(schedules.SHAPES)}"
        )
    _check_outputs(args)
    if args.picture is not None:
        plan = schedules.schedule(*schedules.SHAPES[args.picture])
        Console().print(schedules.picture(plan), soft_wrap=True)
        return 0
    _record([schedules.run()], args, ceilings={})
    return 0


def run_megakernel(args: argparse.Namespace) -> int:
    from mla_jax.bench import megakernel, peers, timing

    shapes = megakernel.find_shapes(None if args.shapes == ["all"] else args.shapes)
    ways = megakernel.find_ways(None if args.backend is None else names(args.backend))
    against = peers.find_peers(args.against)
    _check_outputs(args)
    ceilings = timing.measure_ceilings()
    jobs = [megakernel.bench_shape(shape, ways, against, ceilings) for shape in shapes]
    _record(jobs, args, ceilings=ceilings)
    return 0


def run_paged(args: argparse.Namespace) -> int:
    from mla_jax.bench import paged, peers, results, timing

    # Mistakes first: measuring takes minutes.
    shapes = paged.find_shapes(None if args.shapes == ["all"] else args.shapes)
    if args.profile is not None:
        return _profile(shapes, args.profile)
    against = peers.find_peers(args.against)
    for shape in shapes:
        paged.backend_for(shape, args.backend)
    _check_outputs(args)

    ceilings = timing.measure_ceilings()
    options = {"backend": args.backend, "deterministic": args.deterministic}
    programs = paged.compile_ahead(shapes, **options)
    jobs = [
        paged.bench_shape(shape, against, ceilings, **options, programs=programs)
        for shape in shapes
    ]
    rows = _record(jobs, args, ceilings=ceilings)
    means = paged.geometric_means(rows)
    for peer, mean in means.items():
        print(f"geometric mean of the ratios to {peer}: {mean:.3f}")
    if args.json is not None:
        results.write(args.json, rows, ceilings=ceilings, geometric_means=means)
    return 0


def run_sharded(args: argparse.Namespace) -> int:
    from mla_jax.bench import sharded

    parts = sharded.find_parts(args.only)
    sharded.usable_devices()
    _check_outputs(args)

    count, rates, link = sharded.prepare()
    measured: dict[str, Any] = {"devices": count, **dataclasses.asdict(rates)}
    _record(sharded.run(parts, count, rates, link), args, sharded=True, **measured)
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
    from mla_jax.bench import prefill

    return _run_shapes(prefill, args)


def run_sparse(args: argparse.Namespace) -> int:
    from mla_jax.bench import sparse

    return _run_shapes(sparse, args)


def run_fp8(args: argparse.Namespace) -> int:
    from mla_jax.bench import fp8

    return _run_shapes(fp8, args)


def run_grouped(args: argparse.Namespace) -> int:
    from mla_jax.bench import grouped

    return _run_shapes(grouped, args, grouped.compile_ahead)


def _run_shapes(
    benchmark: Any, args: argparse.Namespace, compile_ahead: Callable[..., Any] | None = None
) -> int:
    """Every shape of a benchmark's module, mistakes first.

    compile_ahead(shapes, backend): what its shapes need compiled, as `prepared`.
    """
    from mla_jax.bench import timing

    shapes = benchmark.find_shapes(None if args.shapes == ["all"] else args.shapes)
    for shape in shapes:
        benchmark.backend_for(shape, args.backend)
    _check_outputs(args)

    ceilings = timing.measure_ceilings()
    options: dict[str, Any] = {"backend": args.backend}
    if compile_ahead is not None:
        options["prepared"] = compile_ahead(shapes, args.backend)
    jobs = [benchmark.bench_shape(shape, ceilings, **options) for shape in shapes]
    _record(jobs, args, ceilings=ceilings)
    return 0
