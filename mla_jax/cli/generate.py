"""`mla-jax generate`: the main job, text from a checkpoint."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from mla_jax.cli import mesh_sizes

LOST_AFTER_SECONDS = 30
"""How long a process may be silent before jax ends the others, with an error that names it."""
DEFAULT_PROMPTS = ("The list object", "A function is", "To open a file,")


def count(text: str) -> int:
    """A positive integer, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def add_parser(subparsers) -> None:
    p = subparsers.add_parser("generate", help="continue prompts with a DeepSeek-style model")
    p.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a Hugging Face folder: config.json, *.safetensors, tokenizer.json "
        "(default: the small byte-level model that comes with the package)",
    )
    p.add_argument(
        "--prompt", action="append", metavar="TEXT", help="once a sequence; may be repeated"
    )
    p.add_argument("--max-new-tokens", type=count, default=128, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=count, metavar="K")
    p.add_argument("--top-p", type=float, metavar="P", help="in (0, 1]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ignore-eos", action="store_true", help="do not stop at an end token")
    p.add_argument(
        "--backend",
        metavar="NAME",
        help="triton or reference, or megakernel: decode steps by a schedule, with 16 or 8 heads, "
        "latent 512 and rope 64 (default: fastest)",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "fp8"),
        help="fp8: weights that the checkpoint has in FP8 stay so (default: the checkpoint's, "
        "FP8 as bfloat16)",
    )
    p.add_argument(
        "--kv-dtype",
        choices=("fp8",),
        help="keep the cache's latents in float8_e4m3fn, and report how that moves the logits that "
        "follow the prompts (default: the model's dtype)",
    )
    p.add_argument(
        "--page-size",
        type=count,
        metavar="N",
        help="tokens a cache page (default: 64, and 256 for megakernel)",
    )
    p.add_argument("--num-pages", type=count, metavar="N", help="cache pages (default: enough)")
    p.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="data=D,model=M,context=C",
        help="run on D * M * C devices: requests over data, heads and experts over model, "
        "cache pages over context (default: one device)",
    )
    p.add_argument(
        "--distributed",
        nargs="*",
        metavar="HOST:PORT INDEX COUNT",
        help="one process of several, all with the same arguments: process INDEX of COUNT, the "
        "first of which listens at HOST:PORT; under Slurm or Open MPI without values",
    )
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    p.set_defaults(run=run)


def _join(place: list[str]) -> bool:
    """Join the other processes; whether this is the one that writes."""
    import jax

    if place:
        address, *numbers = place
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(
                f"--distributed: got {' '.join(place)!r}, expected HOST:PORT INDEX COUNT or nothing"
            )
        index, count = map(int, numbers)
        if index >= count:
            raise ValueError(f"--distributed: got INDEX {index}, expected 0 to {count - 1}")
        known = {"coordinator_address": address, "process_id": index, "num_processes": count}
    else:
        known = {}
    jax.distributed.initialize(**known, heartbeat_timeout_seconds=LOST_AFTER_SECONDS)
    return jax.process_index() == 0


@contextmanager
def _status(console: Console) -> Iterator:
    """A line that changes in place on a terminal; elsewhere only its last state is printed."""
    last = ""

    def show(text: str) -> None:
        nonlocal last
        last = text
        if status is not None:
            status.update(text)

    if console.is_terminal:
        with console.status("loading", spinner="dots") as status:
            yield show
    else:
        status = None
        yield show
    if last:
        console.print(last, markup=False, highlight=False)


def run(args: argparse.Namespace) -> int:
    from mla_jax.checkpoint import load_checkpoint
    from mla_jax.decode_plan import BACKEND
    from mla_jax.generate import default_page_size, stream
    from mla_jax.logit_shift import logit_shift
    from mla_jax.sampling import Sampler
    from mla_jax.sharding import make_mesh
    from mla_jax.tokenizer import load_tokenizer

    # Cheap mistakes first: loading a checkpoint can take minutes.
    Sampler(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    writes = args.distributed is None or _join(args.distributed)
    mesh = None if args.mesh is None else make_mesh(**args.mesh)
    path = args.checkpoint or Path(str(files("mla_jax") / "models" / "tiny"))
    prompts = args.prompt or DEFAULT_PROMPTS
    shift: dict[str, float] = {}
    if args.kv_dtype is not None and mesh is not None:
        raise ValueError("--kv-dtype: got fp8 with --mesh, whose logits are not compared yet")
    if args.kv_dtype is not None and args.backend == BACKEND:
        raise ValueError(f"--kv-dtype: got fp8 with --backend {BACKEND}, which has no fp8 cache")
    errors = Console(stderr=True, quiet=not writes)
    with _status(errors) as show:
        show(f"loading {path}")
        model = load_checkpoint(path, dtype=args.dtype, mesh=mesh)
        tokenizer = load_tokenizer(path, model.config)
        rows = [tokenizer.encode(prompt) for prompt in prompts]
        if args.kv_dtype is not None:
            show(f"comparing the logits of a cache in {args.kv_dtype}")
            shift = logit_shift(
                model,
                [row or [model.config.bos_id or 0] for row in rows],
                kv_dtype=args.kv_dtype,
                backend=args.backend,
                page_size=args.page_size or default_page_size(args.backend),
            )
            errors.print(_shift_line(args.kv_dtype, shift), markup=False, highlight=False)
        made: list[list[int]] = [[] for _ in rows]
        shown = [0] * len(rows)
        show(f"compiling for {len(rows)} sequences")
        progress, seconds = None, 0.0
        for progress in stream(
            model,
            rows,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            backend=args.backend,
            ignore_eos=args.ignore_eos,
            page_size=args.page_size,
            num_pages=args.num_pages,
            mesh=mesh,
            kv_dtype=args.kv_dtype,
        ):
            for row, tokens in zip(made, progress.tokens, strict=True):
                row += tokens
            # The last block's own speed: the first ones hold the compiler's time.
            speed = sum(map(len, progress.tokens)) / (progress.seconds - seconds)
            seconds = progress.seconds
            show(
                f"{sum(map(len, made))} tokens, {speed:.1f} tokens/s, "
                f"{progress.pages_in_use}/{progress.num_pages} cache pages in use"
            )
            if writes and not args.json:
                _print_text(prompts, made, progress.finished, shown, tokenizer)
    assert progress is not None  # --max-new-tokens is at least 1
    if writes and args.json:
        total = sum(map(len, made))
        sequences = [
            {
                "prompt": prompt,
                "text": tokenizer.decode(row),
                "tokens": row,
                "finish": "length" if len(row) == args.max_new_tokens else "end",
            }
            for prompt, row in zip(prompts, made, strict=True)
        ]
        document = {
            "sequences": sequences,
            "tokens": total,
            "seconds": progress.seconds,
            "tokens_per_second": total / progress.seconds,
            "cache_pages": progress.num_pages,
            **({"logit_shift": shift} if shift else {}),
        }
        print(json.dumps(document))
    return 0


def _shift_line(kv_dtype: str, shift: dict[str, float]) -> str:
    """`logit_shift` in one line."""
    return (
        f"logits with the {kv_dtype} cache: moved by {shift['median']:.2g} (median), "
        f"{shift['p99']:.2g} (99 %), {shift['max']:.2g} (most) of a spread of "
        f"{shift['spread']:.2g}; likeliest token kept in {shift['same_token']:.0%} of prompts"
    )


def _print_text(
    prompts: Sequence[str],
    made: list[list[int]],
    finished: list[bool],
    shown: list[int],
    tokenizer,
) -> None:
    """Text to stdout: one sequence as it grows, several each when it ends."""
    if len(prompts) == 1:
        text = tokenizer.decode(made[0])
        # A character may still lack its last bytes: hold back what is not whole yet.
        whole = text if finished[0] else text.rstrip("\N{REPLACEMENT CHARACTER}")
        if shown[0] == 0:
            sys.stdout.write(prompts[0])
        sys.stdout.write(whole[shown[0] :] + ("\n" if finished[0] else ""))
        shown[0] = max(shown[0], len(whole))
    else:
        for row, prompt in enumerate(prompts):
            if finished[row] and not shown[row]:
                sys.stdout.write(f"[{row}] {prompt}{tokenizer.decode(made[row])}\n")
                shown[row] = 1
    sys.stdout.flush()
