"""`mla-jax tune`: measure tiles on the present GPU, and write its table."""

import argparse
from pathlib import Path

from mla_jax.cli.bench import names, positive_integers

OPS = ("paged_decode", "paged_prefill", "causal_prefill")

DESCRIPTION = """\
Times a few tiles for each combination of heads, query tokens and page size, at DeepSeek's widths,
and keeps the fastest in this device's table, which the kernels read. A combination that has an
entry gets a new one; the others stay. Tiles that do not run here are named and skipped.

megakernel, instead, finds the tiles of the one launch that decodes by a schedule, for each number
of query rows (of 16 and 8 heads); then, by launches of hand-made schedules, what its instructions
cost, and `schedule` goes by that."""


def add_parser(subparsers) -> None:
    p = subparsers.add_parser(
        "tune",
        help="find this GPU's fastest tiles",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "what", nargs="?", choices=("tiles", "megakernel"), default="tiles", help="(default: tiles)"
    )
    p.add_argument("--ops", type=names, default=list(OPS), metavar="NAME,…", help=", ".join(OPS))
    p.add_argument("--heads", type=positive_integers, default=[8, 16, 32, 64, 128], metavar="N,N,…")
    p.add_argument(
        *("--tokens", "--query-tokens"),
        type=positive_integers,
        default=[1, 2, 4],
        metavar="N,N,…",
        help="query tokens a request, in decode",
    )
    p.add_argument("--page-sizes", type=positive_integers, default=[64], metavar="N,N,…")
    p.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    p.add_argument("--batch", type=int, default=128, help="requests, of decode's large workload")
    p.add_argument("--length", type=int, default=4096, help="tokens that each has cached")
    p.add_argument("--out", type=Path, metavar="FILE", help="the table (default: the package's)")
    p.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    from pallas_kernels.checks import FLOATS
    from pallas_kernels.paged_decode.api import MAX_QUERY_TOKENS

    for op in args.ops:
        if op not in OPS:
            raise ValueError(f"ops: got {op!r}, expected some of {', '.join(OPS)}")
    if args.dtype not in FLOATS:
        raise ValueError(f"dtype: got {args.dtype!r}, expected one of {', '.join(FLOATS)}")
    if max(args.tokens) > MAX_QUERY_TOKENS:
        raise ValueError(f"tokens: got {max(args.tokens)}, expected at most {MAX_QUERY_TOKENS}")
    if args.batch < 1:
        raise ValueError(f"batch: got {args.batch}, expected at least 1")
    if args.length < max(args.tokens):
        raise ValueError(f"length: got {args.length}, expected at least the query tokens")
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"out: {args.out.parent} is not a folder")


def _targets(args: argparse.Namespace, device) -> list:
    from mla_jax.bench import tune

    shared = {"dtype": args.dtype, "length": args.length}
    targets = []
    for page_size in args.page_sizes:
        for heads in args.heads:
            paged = {"heads": heads, "page_size": page_size, **shared}
            if "paged_decode" in args.ops:
                targets += [
                    tune.decode_target(tokens=tokens, batch=args.batch, **paged)
                    for tokens in args.tokens
                ]
            if "paged_prefill" in args.ops:
                targets.append(tune.prefill_target(**paged))
    if "causal_prefill" in args.ops:
        targets.append(tune.causal_target(device=device, **shared))
    return targets


def _line(values: dict) -> str:
    return " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def _tune_megakernel(tokens: list[int], processors: int, path: Path, console) -> None:
    from mla_jax.bench import costs, results
    from pallas_kernels import tuning
    from pallas_kernels.paged_attention import PagedTiles
    from pallas_kernels.schedule.instructions.words import QUERY_TOKENS

    # Where both have so many rows, 16 heads stand for them: as most models have.
    groups = {min(n, QUERY_TOKENS) * heads: heads for heads in (8, 16) for n in tokens}
    for rows, heads in sorted(groups.items()):
        count = rows // heads
        tiles = _tune_tiles(costs.tiles_target(tokens=count, heads=heads), path, console)
        entry, times = costs.measure_costs(count, heads, processors, PagedTiles(**tiles))
        tuning.record(path, entry, results.header())
        line = f"{entry['op']} rows {rows}: {_line(entry['costs'])}"
        console.print(line, soft_wrap=True, highlight=False)
        for experiment, measured, promised in times:
            words = _line(experiment._asdict())
            line = f"  {words}: {measured:.4g} us, the model says {promised:.4g}"
            console.print(line, soft_wrap=True, highlight=False)


def _tune_tiles(target, path: Path, console) -> dict:
    import dataclasses

    from mla_jax.bench import results, tune
    from pallas_kernels import tuning

    entry, skipped = tune.measure(target)
    tuning.record(path, entry, results.header())  # what is measured stays, whatever comes
    key = " ".join(f"{name} {value}" for name, value in target.key.items() if name != "op")
    console.print(
        f"{target.key['op']:14} {key}: {entry['us']:.4g} us, default {entry['default_us']:.4g}"
        f" us, {_line(entry['tiles'])}",
        soft_wrap=True,
        highlight=False,
    )
    for tiles, reason in skipped.items():
        words = f"  skipped {_line(dataclasses.asdict(tiles))}: {reason}"
        console.print(words, soft_wrap=True, highlight=False, markup=False)
    return entry["tiles"]


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pallas_kernels import tuning
    from pallas_kernels.backend import needs_gpu
    from pallas_kernels.device import current_device
    from pallas_kernels.paged_attention.tiles import DEFAULT_CORES

    _check(args)
    device = current_device()
    if reason := needs_gpu(device):
        raise RuntimeError(f"tune: {reason}")
    path = args.out or tuning.FOLDER / tuning.table_name(device.kind)
    tuning.read_table(path)  # before measuring: whether it is one

    console = Console()
    if args.what == "megakernel":
        _tune_megakernel(args.tokens, device.num_cores or DEFAULT_CORES, path, console)
        return 0
    for target in _targets(args, device):
        _tune_tiles(target, path, console)
    return 0
