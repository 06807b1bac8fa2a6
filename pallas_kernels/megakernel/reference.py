"""The table executed in plain jnp: all partials at once, then all reductions of each level."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.megakernel.program import Partials, Program, Reductions, token_groups
from pallas_kernels.merge import merge_states
from pallas_kernels.paged_attention import attend_pages_reference
from pallas_kernels.schedule.instructions.quality import STEP

State = tuple[Array, Array]
"""(out, base-2 lse)."""


def _attend(
    partials: Partials,
    q_rot: Array,
    q_v: Array,
    k_rot: Array,
    v: Array,
    table: Array,
    scale: Array,
) -> tuple[Float[Array, "partials tokens heads latent"], Float[Array, "partials tokens heads"]]:
    """A partial is a request whose pages are the sequence's steps from its start on."""
    batch, tokens = q_v.shape[:2]
    groups, size = token_groups(tokens)

    def queries(q: Array) -> Array:
        padded = jnp.pad(q, ((0, 0), (0, groups * size - tokens), (0, 0), (0, 0)))
        grouped = padded.reshape(batch * groups, size, *q.shape[2:])
        return grouped[partials.batch * groups + partials.q_seq // size]

    def steps(pool: Array) -> Array:
        return pool.reshape(-1, STEP, pool.shape[-1])

    steps_a_page = v.shape[1] // STEP
    pages = jnp.clip(table, 0, v.shape[0] - 1)
    ids = (pages[..., None] * steps_a_page + jnp.arange(steps_a_page)).ravel()
    first = partials.length - tokens + partials.q_seq - partials.start
    return attend_pages_reference(
        *(queries(q_v), queries(q_rot), steps(v), steps(k_rot), ids.astype(jnp.int32)),
        partials.batch * (ids.size // batch) + partials.start // STEP,
        *(partials.end - partials.start, first, scale),
        out_dtype=jnp.float32,
    )


def _reduce(reductions: Reductions, group_size: int, scratch: State) -> State:
    """Every reduction of what is in scratch now, in the order of its dependencies."""
    out, lse = scratch
    slot = reductions.token % group_size

    def merge(i: Array, state: State) -> State:
        row = reductions.dependencies[:, i]
        weight = jnp.where((i < reductions.inputs)[:, None], lse[row, slot], -jnp.inf)
        return merge_states(*state, out[row, slot], weight)

    number = reductions.token.shape[0]
    nothing = (
        jnp.zeros((number, *out.shape[2:]), jnp.float32),
        jnp.full((number, out.shape[2]), -jnp.inf, jnp.float32),
    )
    return lax.fori_loop(0, jnp.max(reductions.inputs), merge, nothing)


def run_reference(
    program: Program,
    q_rot: Float[Array, "batch tokens heads rope"],
    q_v: Float[Array, "batch tokens heads latent"],
    k_rot: Float[Array, "pages page rope"],
    v: Float[Array, "pages page latent"],
    table: Int[Array, "batch max_pages"],
    scale: Float[Array, ""],
) -> Float[Array, "batch tokens heads latent"]:
    """The output of `program`, of q_v's dtype."""
    partials, reductions = program.partials, program.reductions
    batch, tokens, heads, latent = q_v.shape
    _, size = token_groups(tokens)
    part, part_lse = _attend(partials, q_rot, q_v, k_rot, v, table, scale)

    nowhere = program.scratch_rows
    to = jnp.where(partials.busy & (partials.row >= 0), partials.row, nowhere)
    out = jnp.zeros((program.scratch_rows, size, heads, latent), jnp.float32)
    lse = jnp.full(out.shape[:3], -jnp.inf, jnp.float32)
    scratch = out.at[to].set(part, mode="drop"), lse.at[to].set(part_lse, mode="drop")

    token = partials.q_seq[:, None] + jnp.arange(size, dtype=jnp.int32)
    whole = (partials.busy & (partials.row < 0))[:, None] & (token < tokens)
    to = jnp.where(whole, partials.batch[:, None] * tokens + token, batch * tokens)
    result = jnp.zeros((batch * tokens, heads, latent), q_v.dtype)
    result = result.at[to].set(part.astype(q_v.dtype), mode="drop")

    for level in range(1, program.depth + 1):
        merged, merged_lse = _reduce(reductions, size, scratch)
        now = reductions.level == level
        to = jnp.where(now & (reductions.row >= 0), reductions.row, nowhere)
        slot = reductions.token % size
        scratch = (
            scratch[0].at[to, slot].set(merged, mode="drop"),
            scratch[1].at[to, slot].set(merged_lse, mode="drop"),
        )
        to = reductions.batch * tokens + reductions.token
        to = jnp.where(now & (reductions.row < 0), to, batch * tokens)
        result = result.at[to].set(merged.astype(q_v.dtype), mode="drop")
    return result.reshape(q_v.shape)
