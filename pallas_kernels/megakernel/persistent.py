"""The table executed by one launch of a Pallas Triton kernel: a block is a processor.

Each block walks its queue, or takes the next instruction of a global one, and waits where an
instruction's inputs are not there yet. With queues of their own, all blocks must run at a time; a
global queue holds producers before their consumers, so that a block never waits for what nobody
has taken.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.device import Device, current_device
from pallas_kernels.megakernel.instructions import (
    Instruction,
    Memory,
    Static,
    run_partial,
    run_reduction,
)
from pallas_kernels.megakernel.program import global_order, token_groups
from pallas_kernels.megakernel.signals import (
    LAUNCHES,
    PATIENCE,
    end_block,
    make_signals,
    take_ticket,
)
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_attention.tiles import default_tiles
from pallas_kernels.schedule import Schedule
from pallas_kernels.schedule.instructions.words import NO_OP, PARTIAL, REDUCTION, WORDS
from pallas_kernels.tuning import tuned


def choose_tiles(new_tokens: int, heads: int, dtype: str, device: Device) -> PagedTiles:
    """The device's tuned tiles, else those of paged attention."""
    rows = token_groups(new_tokens)[1] * heads
    found = tuned("megakernel", device, rows=rows, dtype=dtype)
    return PagedTiles(**found) if found else default_tiles(rows, dtype)


def _kernel(*refs, static: Static, with_lengths: bool, queue: str, longest: int):
    inputs, (out, part, part_lse, signals) = list(refs[:-4]), refs[-4:]
    q_v, q_rot, v, k_rot, table, scale, words = (inputs.pop(0) for _ in range(7))
    lengths = inputs.pop(0) if with_lengths else None
    memory = Memory(
        *((q_v, q_rot), (v, k_rot), table, scale, words, lengths, out, part, part_lse, signals)
    )
    launch = signals[LAUNCHES] + 1

    def execute(index) -> None:
        instruction = Instruction(words, index)
        op = instruction[0]

        @pl.when(op == PARTIAL)
        def _():
            run_partial(memory, static, instruction, launch)

        @pl.when(op == REDUCTION)
        def _():
            run_reduction(memory, static, instruction, launch)

    if queue == "global":
        order, number = inputs[0], words.shape[0]

        def take(_):
            ticket = take_ticket(signals, static.interpret)
            index = order[jnp.minimum(ticket, number - 1)]
            # No-ops are the last: where one stands, nothing is left.
            left = (ticket < number) & (words[index, 0] != NO_OP)

            @pl.when(left)
            def _():
                execute(index)

            return left

        lax.while_loop(lambda left: left, take, jnp.bool_(True))
    else:
        first = pl.program_id(0) * longest

        lax.fori_loop(0, longest, lambda place, _: execute(first + place), None)
    end_block(signals, launch, pl.num_programs(0), static.interpret)


def run_persistent(
    schedule: Schedule,
    lengths: Int[Array, " batch"] | None,
    signals: Int[Array, " words"] | None,
    q_rot: Float[Array, "batch tokens heads rope"],
    q_v: Float[Array, "batch tokens heads latent"],
    k_rot: Float[Array, "pages page rope"],
    v: Float[Array, "pages page latent"],
    table: Int[Array, "batch max_pages"],
    scale: Float[Array, ""],
    *,
    queue: str = "processors",
    interpret: bool = False,
    patience: int | None = None,
    tiles: PagedTiles | None = None,
) -> tuple[Float[Array, "batch tokens heads latent"], Int[Array, " words"]]:
    """(the output, of q_v's dtype; `signals` for the next launch).

    patience, tiles: None takes their defaults; in the interpreter, where nothing comes to one that
    waits, that is not to wait.
    """
    assert schedule.bounds is not None
    if patience is None:
        patience = 1 if interpret else PATIENCE
    _, tokens, heads, latent = q_v.shape
    tiles = tiles or choose_tiles(tokens, heads, str(q_v.dtype), current_device())
    static = Static(tokens, heads, tiles, patience, interpret)
    given = make_signals(schedule) if signals is None else signals
    flat = [q.reshape(-1, q.shape[-1]) for q in (q_v, q_rot)]
    rows = flat[0].shape[0]
    if rows < tiles.rows:
        flat = [jnp.pad(q, ((0, tiles.rows - rows), (0, 0))) for q in flat]
    words = jnp.asarray(schedule.instructions).reshape(-1, WORDS)
    args = [*flat, v, k_rot, table, scale.reshape(1), words]
    args += [] if lengths is None else [lengths]
    args += [global_order(schedule)] if queue == "global" else []
    args.append(given)
    processors, longest = schedule.instructions.shape[:2]
    slots = schedule.bounds[2] * static.slot_rows
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out, _, _, after = pl.pallas_call(
        functools.partial(
            _kernel,
            static=static,
            with_lengths=lengths is not None,
            queue=queue,
            longest=longest,
        ),
        grid=(processors,),
        in_specs=[whole] * len(args),
        out_specs=[whole] * 4,
        out_shape=[
            jax.ShapeDtypeStruct((rows, latent), q_v.dtype),
            jax.ShapeDtypeStruct((slots, latent), jnp.float32),
            jax.ShapeDtypeStruct((slots,), jnp.float32),
            jax.ShapeDtypeStruct(given.shape, given.dtype),
        ],
        input_output_aliases={len(args) - 1: 3},
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name="mla_megakernel",
    )(*args)
    return out.reshape(q_v.shape), after
