"""Argument checks that grouped decode and sparse prefill share."""

import jax.numpy as jnp
from jaxtyping import Array


def axes(*sizes: int | str) -> str:
    """A shape, some of whose sizes are words."""
    return f"[{', '.join(map(str, sizes))}]"


def check_mask(mask: Array, batch: int, heads: int, rest: tuple[int, ...]) -> None:
    """ValueError for a mask that is not [batch, 1 or heads, *rest]; TypeError for integers."""
    if mask.shape not in ((batch, 1, *rest), (batch, heads, *rest)):
        raise ValueError(
            f"mask: got shape {mask.shape}, expected {axes(batch, f'1 or {heads}', *rest)}"
        )
    if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise TypeError(f"mask: got dtype {mask.dtype}, expected bool or a floating dtype")
