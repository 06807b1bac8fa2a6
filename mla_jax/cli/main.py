"""`mla-jax`: generate, bench, tune, doctor, train-tiny."""

import argparse
import os
import sys

from rich.console import Console


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from mla_jax.cli import bench, doctor, generate, train_tiny, tune

    top = argparse.ArgumentParser(
        prog="mla-jax", description="Multi-head Latent Attention for JAX on GPUs."
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, bench, tune, doctor, train_tiny):
        module.add_parser(subparsers)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Mistakes of the caller's are one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, OverflowError, RuntimeError, ImportError) as error:
        if os.environ.get("MLA_JAX_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(f"mla-jax: {message}", style="red", soft_wrap=True, markup=False)
        return 2
    except KeyboardInterrupt:
        print("mla-jax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
