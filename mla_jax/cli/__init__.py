"""The `mla-jax` command: one small file a subcommand."""

import argparse

from mla_jax.config import ModelConfig, presets


def find_preset(name: str) -> ModelConfig:
    """The preset of that name. Errors: ValueError, listing the names."""
    if name not in presets:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(presets)}")
    return presets[name]


def mesh_sizes(text: str) -> dict[str, int]:
    """data=2,model=4 -> {"data": 2, "model": 4}, for argparse."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "model", "context") or name in sizes or not size.isdecimal():
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected sizes of data, model and context, as data=2,model=4"
            )
        sizes[name] = int(size)
    return sizes
