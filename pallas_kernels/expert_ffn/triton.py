"""The expert feed-forward as two Pallas kernels, lowered through Triton.

Both are the same grouped product: a block takes a tile of (token, expert) pairs that share an
expert, gathers their rows, and multiplies them with some of the expert's outputs. So only experts
that a token chose are read, and none is copied. Shared experts are experts that every token
chose, in arrays of their own.

FP8 weights stay so until they are in registers. A step then takes columns that share their scales,
and scales its product; what is multiplied with them is quantised between the kernels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_scaled import BlockScaled, quantize_groups
from pallas_kernels.expert_ffn.tiles import (
    ExpertProblem,
    ExpertTiles,
    RowTiles,
    choose_tiles,
    plan_row_tiles,
)
from pallas_kernels.precision import GROUP, precision_for


def unsupported(problem: ExpertProblem) -> str | None:
    """None if the kernels can run `problem`, else the reason why not."""
    for name in ("inter", "dim"):
        if getattr(problem, name) % 16:
            return f"{name} is {getattr(problem, name)}, the kernel needs a multiple of 16"
    if problem.same_scale is not None and problem.same_scale < 16:
        return f"a block of weights is {problem.block}, the kernel needs columns in multiples of 16"
    if problem.block is not None and problem.shared > 1 and problem.inter % GROUP:
        return f"inter is {problem.inter}, which cuts groups of {GROUP} where shared experts meet"
    return None


class _Scaled(NamedTuple):
    """Numbers, or references to them, and the scales of FP8 ones."""

    values: Any
    scales: Any = None


def _load_rows(source: _Scaled, rows, valid, step, depth) -> _Scaled:
    """Columns step*depth.. of the `rows` of a matrix; zeros where not valid."""
    columns = step * depth + jnp.arange(depth)
    values = source.values.at[rows[:, None], columns[None, :]]
    values = plgpu.load(values, mask=valid[:, None], other=0.0)
    if source.scales is None:
        return _Scaled(values)
    scales = source.scales.at[rows, step * depth // GROUP]
    return _Scaled(values, plgpu.load(scales, mask=valid, other=0.0))


def _load_weight(
    source: _Scaled, stack: tuple, row, column, tiles: ExpertTiles, problem: ExpertProblem
) -> _Scaled:
    """The tile at (row, column) of the matrix source[stack]."""
    values = source.values[(*stack, pl.ds(row, tiles.columns), pl.ds(column, tiles.depth))]
    if problem.block is None:
        return _Scaled(values)
    block_rows, block_columns = problem.block
    rows = (row + jnp.arange(tiles.columns)) // block_rows
    return _Scaled(values, plgpu.load(source.scales.at[(*stack, rows, column // block_columns)]))


def _dot(a: _Scaled, b: _Scaled, acc):
    if a.scales is None:
        precision = precision_for(a.values.dtype)
        return acc + plgpu.dot(a.values, b.values, trans_b=True, precision=precision)
    # bfloat16 holds every e4m3 number, and every GPU multiplies it.
    a_values, b_values = (tile.values.astype(jnp.bfloat16) for tile in (a, b))
    product = plgpu.dot(a_values, b_values, trans_b=True)
    return acc + product * a.scales[:, None] * b.scales[None, :]


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
    x: _Scaled,  # [T, D]
    gate_up: _Scaled,  # [E, 2, I, D]
    shared_gate_up: _Scaled,  # [2, E' * I, D]
    *plan_and_out,  # the RowTiles, then hidden [P, I]
    tiles: ExpertTiles,
    problem: ExpertProblem,
):
    *plan_refs, hidden_ref = plan_and_out
    column = pl.program_id(0) * tiles.columns

    def run(expert, shared, token, pair, valid):
        source, row = gate_up, column
        if shared:
            source, row = shared_gate_up, expert * problem.inter + column

        def step(i, acc):
            rows = _load_rows(x, token, valid, i, tiles.depth)
            stacks = ((which,) if shared else (expert, which) for which in (0, 1))
            weights = [
                _load_weight(source, stack, row, i * tiles.depth, tiles, problem)
                for stack in stacks
            ]
            return tuple(_dot(rows, w, part) for w, part in zip(weights, acc, strict=True))

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        gate, up = lax.fori_loop(0, problem.dim // tiles.depth, step, (zeros, zeros))
        hidden = gate * jax.nn.sigmoid(gate) * up
        columns = column + jnp.arange(tiles.columns)
        plgpu.store(
            hidden_ref.at[pair[:, None], columns[None, :]],
            hidden.astype(hidden_ref.dtype),
            mask=valid[:, None],
        )

    _for_tile(plan_refs, problem, tiles, run)


def _output_kernel(
    hidden: _Scaled,  # [P, I]
    down: _Scaled,  # [E, D, I]
    shared_down: _Scaled,  # [D, E' * I]
    weights_ref,  # [P]
    *plan_and_out,  # the RowTiles, then out [P, D]
    tiles: ExpertTiles,
    problem: ExpertProblem,
):
    *plan_refs, out_ref = plan_and_out
    column = pl.program_id(0) * tiles.columns

    def run(expert, shared, token, pair, valid):
        del token
        source, stack, first = down, (expert,), 0
        if shared:
            source, stack, first = shared_down, (), expert * problem.inter

        def step(i, acc):
            rows = _load_rows(hidden, pair, valid, i, tiles.depth)
            at = first + i * tiles.depth
            return _dot(rows, _load_weight(source, stack, column, at, tiles, problem), acc)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        y = lax.fori_loop(0, problem.inter // tiles.depth, step, zeros)
        if not shared:
            y = y * plgpu.load(weights_ref.at[pair], mask=valid, other=0)[:, None]
        columns = column + jnp.arange(tiles.columns)
        plgpu.store(out_ref.at[pair[:, None], columns[None, :]], y, mask=valid[:, None])

    _for_tile(plan_refs, problem, tiles, run)


def _launch(
    kernel,
    name: str,
    operands: tuple[_Scaled | Array, ...],
    plan: RowTiles,
    out: jax.ShapeDtypeStruct,
    problem: ExpertProblem,
    tiles: ExpertTiles,
    interpret: bool,
) -> Array:
    """Run `kernel` on a grid of (output columns, tiles of pairs)."""
    shared_tiles = problem.shared * pl.cdiv(problem.tokens, tiles.rows)
    inputs = (*operands, *plan)
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, problem=problem),
        grid=(out.shape[1] // tiles.columns, plan.expert.shape[0] + shared_tiles),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), inputs),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*inputs)


def expert_ffn_triton(
    x: Float[Array, "tokens dim"],
    expert_ids: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    gate_up: Float[Array, "experts 2 inter dim"] | BlockScaled,
    down: Float[Array, "experts dim inter"] | BlockScaled,
    shared: tuple[Float[Array, "2 wide dim"] | BlockScaled, Float[Array, "dim wide"] | BlockScaled]
    | None,
    *,
    partial: bool,
    interpret: bool,
) -> Float[Array, "tokens dim"]:
    """`expert_ffn` on the Triton lowering."""
    problem = ExpertProblem.of(expert_ids, gate_up, shared)
    dim, inter = problem.dim, problem.inter

    def rows(x: Array) -> _Scaled:
        if not isinstance(gate_up, BlockScaled):
            return _Scaled(x)
        return _Scaled(*quantize_groups(x, power_of_two=gate_up.power_of_two))

    def matrix(weight: Array | BlockScaled) -> _Scaled:
        if not isinstance(weight, BlockScaled):
            return _Scaled(weight)
        return _Scaled(weight.values, weight.scales)

    # Without shared experts the kernels never read theirs: any will do.
    shared_gate_up, shared_down = shared or (gate_up, down)

    hidden_tiles = choose_tiles(problem, gated=True)
    output_tiles = choose_tiles(problem, gated=False)
    plan = plan_row_tiles(
        expert_ids.reshape(-1), problem.experts, hidden_tiles.rows, partial=partial
    )
    hidden = _launch(
        _hidden_kernel,
        "moe_hidden",
        (rows(x), matrix(gate_up), matrix(shared_gate_up)),
        plan,
        jax.ShapeDtypeStruct((problem.rows, inter), x.dtype),
        problem,
        hidden_tiles,
        interpret,
    )
    y = _launch(
        _output_kernel,
        "moe_output",
        (rows(hidden), matrix(down), matrix(shared_down), weights.reshape(-1)),
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
