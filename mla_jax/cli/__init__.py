"""The `mla-jax` command: one small file a subcommand."""

from mla_jax.config import ModelConfig, presets


def find_preset(name: str) -> ModelConfig:
    """The preset of that name. Errors: ValueError, listing the names."""
    if name not in presets:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(presets)}")
    return presets[name]
