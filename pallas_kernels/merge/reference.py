"""Merging attention over disjoint sets of keys by its log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_states(
    out_a: Float[Array, "*rows width"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows width"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows width"], Float[Array, "*rows"]]:
    """Attention over two disjoint sets of keys, from the attention over each (one XLA fusion).

    out: normalised results, of one dtype, which the merged one has too; lse: base-2 log-sum-exp,
    float32, -inf for a set without keys, whose `out` is not looked at. Exact for empty states: one
    leaves the other as it is, two give 0 and -inf. Associative up to rounding, so sets
    can be merged in any order; differentiable, empty states included.
    Errors: ValueError (shape), TypeError (dtype).

    >>> out, lse = merge_states(jnp.ones((2, 4)), jnp.zeros(2), jnp.zeros((2, 4)), jnp.zeros(2))
    >>> out.shape, lse.tolist()
    ((2, 4), [1.0, 1.0])
    """
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b: got shape {out_b.shape}, expected out_a's {out_a.shape}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b: got dtype {out_b.dtype}, expected out_a's {out_a.dtype}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(f"{name}: got shape {lse.shape}, expected {out_a.shape[:-1]}")
        if lse.dtype != jnp.float32:
            raise TypeError(f"{name}: got dtype {lse.dtype}, expected float32")
    empty_a, empty_b = jnp.isneginf(lse_a), jnp.isneginf(lse_b)
    # Selected before they are subtracted: inf - inf would poison values and gradients alike.
    a, b = jnp.where(empty_a, 0.0, lse_a), jnp.where(empty_b, 0.0, lse_b)
    top = jnp.where(empty_a, b, jnp.where(empty_b, a, jnp.maximum(a, b)))
    weight_a = jnp.where(empty_a, 0.0, jnp.exp2(a - top))
    weight_b = jnp.where(empty_b, 0.0, jnp.exp2(b - top))
    both_empty = empty_a & empty_b
    total = jnp.where(both_empty, 1.0, weight_a + weight_b)

    def weighted(out: Array, weight: Array, empty: Array) -> Array:
        out = jnp.where(empty[..., None], 0.0, out.astype(jnp.float32))
        return out * (weight / total)[..., None]

    out = weighted(out_a, weight_a, empty_a) + weighted(out_b, weight_b, empty_b)
    lse = jnp.where(both_empty, -jnp.inf, top + jnp.log2(total))
    return out.astype(out_a.dtype), lse
