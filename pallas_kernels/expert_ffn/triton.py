"""The expert feed-forward as two Pallas kernels, lowered through Triton.

Both are the same grouped product: a block takes a tile of (token, expert) pairs that share an
expert, gathers their rows, and multiplies them with some of the expert's outputs. So only experts
that a token chose are read, and none is copied. Shared experts are experts that every token
chose, in arrays of their own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_ffn.tiles import (
    ExpertProblem,
    ExpertTiles,
    RowTiles,
    choose_tiles,
    plan_row_tiles,
)
from pallas_kernels.precision import precision_for


def unsupported(problem: ExpertProblem) -> str | None:
    """None if the kernels can run `problem`, else the reason why not."""
    for name in ("inter", "dim"):
        if getattr(problem, name) % 16:
            return f"{name} is {getattr(problem, name)}, the kernel needs a multiple of 16"
    return None


def _load_rows(ref, rows, valid, step, depth):
    """Columns step*depth.. of the `rows` of a matrix; zeros where not valid."""
    columns = step * depth + jnp.arange(depth)
    return plgpu.load(ref.at[rows[:, None], columns[None, :]], mask=valid[:, None], other=0)


def _dot(a, b, acc):
    return acc + plgpu.dot(a, b, trans_b=True, precision=precision_for(a.dtype))


def _for_tile(plan_refs, problem: ExpertProblem, tiles: ExpertTiles, run):
    """Call run(expert, shared, token [rows], pair [rows], valid [rows]) for this block's tile.

    The first tiles are the plan's; then every shared expert has the tokens in order. `expert`
    counts among the routed or, if the static `shared`, among the shared experts. `pair` is the row
    of the hidden layer: the routed pairs, then the tokens of each shared expert; rows that are
    not valid lie past the last. An empty tile runs nothing.
    """
    order_ref, expert_ref, first_ref, count_ref = plan_refs
    tile, planned = pl.program_id(1), expert_ref.shape[0]
    index = jnp.arange(tiles.rows)

    def routed():
        count = count_ref[tile]

        @pl.when(count > 0)
        def _():
            valid = index < count
            order = order_ref.at[first_ref[tile] + index]
            pair = plgpu.load(order, mask=valid, other=problem.rows)
            run(expert_ref[tile], False, pair // problem.active, pair, valid)

    def shared():
        tiles_an_expert = pl.cdiv(problem.tokens, tiles.rows)
        expert = (tile - planned) // tiles_an_expert
        token = (tile - planned) % tiles_an_expert * tiles.rows + index
        valid = token < problem.tokens
        pair = problem.routed_rows + expert * problem.tokens + token
        run(expert, True, token, jnp.where(valid, pair, problem.rows), valid)

    if problem.shared:
        pl.when(tile < planned)(routed)
        pl.when(tile >= planned)(shared)
    else:
        routed()


def _hidden_kernel(
    x_ref,  # [T, D]
    gate_up_ref,  # [E, 2, I, D]
    shared_ref,  # [2, E', I, D]
    *plan_and_out,  # the RowTiles, then hidden [P, I]
    tiles: ExpertTiles,
    problem: ExpertProblem,
):
    *plan_refs, hidden_ref = plan_and_out
    column = pl.program_id(0) * tiles.columns
    rows = pl.ds(column, tiles.columns)

    def run(expert, shared, token, pair, valid):

        def step(i, acc):
            gate, up = acc
            x = _load_rows(x_ref, token, valid, i, tiles.depth)
            k = pl.ds(i * tiles.depth, tiles.depth)
            if shared:
                w_gate, w_up = shared_ref[0, expert, rows, k], shared_ref[1, expert, rows, k]
            else:
                w_gate, w_up = gate_up_ref[expert, 0, rows, k], gate_up_ref[expert, 1, rows, k]
            return _dot(x, w_gate, gate), _dot(x, w_up, up)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        gate, up = lax.fori_loop(0, x_ref.shape[1] // tiles.depth, step, (zeros, zeros))
        hidden = gate * jax.nn.sigmoid(gate) * up
        columns = column + jnp.arange(tiles.columns)
        plgpu.store(
            hidden_ref.at[pair[:, None], columns[None, :]],
            hidden.astype(hidden_ref.dtype),
            mask=valid[:, None],
        )

    _for_tile(plan_refs, problem, tiles, run)


def _output_kernel(
    hidden_ref,  # [P, I]
    down_ref,  # [E, D, I]
    shared_ref,  # [D, E', I]
    weights_ref,  # [P]
    *plan_and_out,  # the RowTiles, then out [P, D]
    tiles: ExpertTiles,
    problem: ExpertProblem,
):
    *plan_refs, out_ref = plan_and_out
    column = pl.program_id(0) * tiles.columns
    rows = pl.ds(column, tiles.columns)

    def run(expert, shared, token, pair, valid):
        del token

        def step(i, acc):
            hidden = _load_rows(hidden_ref, pair, valid, i, tiles.depth)
            k = pl.ds(i * tiles.depth, tiles.depth)
            w_down = shared_ref[rows, expert, k] if shared else down_ref[expert, rows, k]
            return _dot(hidden, w_down, acc)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        y = lax.fori_loop(0, hidden_ref.shape[1] // tiles.depth, step, zeros)
        if not shared:
            y = y * plgpu.load(weights_ref.at[pair], mask=valid, other=0)[:, None]
        columns = column + jnp.arange(tiles.columns)
        plgpu.store(out_ref.at[pair[:, None], columns[None, :]], y, mask=valid[:, None])

    _for_tile(plan_refs, problem, tiles, run)


def _launch(
    kernel,
    name: str,
    operands: tuple[Array, ...],
    plan: RowTiles,
    out: jax.ShapeDtypeStruct,
    problem: ExpertProblem,
    tiles: ExpertTiles,
    interpret: bool,
) -> Array:
    """Run `kernel` on a grid of (output columns, tiles of pairs)."""
    shared_tiles = problem.shared * pl.cdiv(problem.tokens, tiles.rows)
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, problem=problem),
        grid=(out.shape[1] // tiles.columns, plan.expert.shape[0] + shared_tiles),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(operands) + len(plan)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*operands, *plan)


def expert_ffn_triton(
    x: Float[Array, "tokens dim"],
    expert_ids: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    gate_up: Float[Array, "experts 2 inter dim"],
    down: Float[Array, "experts dim inter"],
    shared: tuple[Float[Array, "2 wide dim"], Float[Array, "dim wide"]] | None,
    *,
    partial: bool,
    interpret: bool,
) -> Float[Array, "tokens dim"]:
    """`expert_ffn` on the Triton lowering."""
    problem = ExpertProblem.of(expert_ids, gate_up, shared)
    dim, inter = problem.dim, problem.inter
    # Without shared experts the kernels never read these: any array of the right rank will do.
    shared_gate_up, shared_down = shared or (gate_up, down)
    shared_gate_up = shared_gate_up.reshape(2, -1, inter, dim)
    shared_down = shared_down.reshape(dim, -1, inter)

    hidden_tiles = choose_tiles(problem, gated=True)
    output_tiles = choose_tiles(problem, gated=False)
    plan = plan_row_tiles(
        expert_ids.reshape(-1), problem.experts, hidden_tiles.rows, partial=partial
    )
    hidden = _launch(
        _hidden_kernel,
        "moe_hidden",
        (x, gate_up, shared_gate_up),
        plan,
        jax.ShapeDtypeStruct((problem.rows, inter), x.dtype),
        problem,
        hidden_tiles,
        interpret,
    )
    y = _launch(
        _output_kernel,
        "moe_output",
        (hidden, down, shared_down, weights.reshape(-1)),
        plan,
        jax.ShapeDtypeStruct((problem.rows, dim), jnp.float32),
        problem,
        output_tiles,
        interpret,
    )
    routed = y[: problem.routed_rows].reshape(problem.tokens, problem.active, dim)
    if partial:
        # No block wrote the rows of experts that are not here.
        routed = jnp.where((expert_ids < problem.experts)[..., None], routed, 0)
    routed = routed.sum(axis=1)
    always = y[problem.routed_rows :].reshape(problem.shared, problem.tokens, dim).sum(axis=0)
    return (routed + always).astype(x.dtype)
