"""Split plans that a caller fixes: by a number of splits, or by each request's own length."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention import PagedProblem
from pallas_kernels.schedule import SplitPlan, plan_segments

FEWEST_STEPS, MOST_PARTS = 8, 64
"""A deterministic split is at least so many steps, and a request has at most so many."""


def fixed_splits(
    steps: Int[Array, " units"],
    problem: PagedProblem,
    keys: int,
    *,
    num_splits: int | None,
    deterministic: bool,
) -> SplitPlan | None:
    """The plan of steps of `keys` keys that does not depend on other requests; None: none asked.

    Units are the problem's requests, or so many tiles of rows of each.
    """
    units = steps.shape[0]
    tiles = units // problem.batch
    if num_splits is not None:
        share = jnp.maximum((steps + num_splits - 1) // num_splits, 1)
        return plan_segments(steps, share, units * num_splits)
    if deterministic:
        # Requests have ids of their own, so all ids bound the tokens of all requests. Where garbage
        # says otherwise, the plan stays within its bounds.
        most_steps = tiles * (-(-problem.num_ids * problem.page_size // keys) + problem.batch)
        past = jnp.minimum(jnp.cumsum(steps), most_steps)
        steps = jnp.diff(past, prepend=0).astype(jnp.int32)
        share = jnp.maximum((steps + MOST_PARTS - 1) // MOST_PARTS, FEWEST_STEPS)
        most = min(most_steps // FEWEST_STEPS + units, units * MOST_PARTS)
        return plan_segments(steps, share, most)
    return None
