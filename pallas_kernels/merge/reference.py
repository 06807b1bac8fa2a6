"""Merging partial attention results by their log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    out: Float[Array, "parts *rows latent"], lse: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows latent"], Float[Array, "*rows"]]:
    """Attention over the union of disjoint key sets, from the attention over each.

    out: normalised partial results, float32. lse: base-2 log-sum-exp of each, float32, -inf for a
    part that saw no key (its `out` must be finite). Exact for empty parts; all empty gives 0 and
    -inf.
    """
    top = lse.max(axis=0)
    shift = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp2(lse - shift)
    total = weights.sum(axis=0)
    merged = (out * weights[..., None]).sum(axis=0)
    return merged / jnp.where(total == 0, 1.0, total)[..., None], jnp.log2(total) + shift
