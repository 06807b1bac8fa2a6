"""Decode attention by an instruction schedule, as ThunderKittens' MLA megakernel runs it.

`schedule` cuts a batch into instructions on the host; `mla_decode` executes them, in one launch
where it can. `plan_decode` makes one for decode steps of a model.
"""

from jaxtyping import Array, Float, Int

from mla_jax.decode_plan import DecodePlan, plan_decode
from pallas_kernels.megakernel import check_signals, decode_by_schedule, make_signals
from pallas_kernels.schedule import CostModel, Schedule, get_quality, schedule

__all__ = [
    "CostModel",
    "DecodePlan",
    "Schedule",
    "check_signals",
    "decode_with_signals",
    "get_quality",
    "make_signals",
    "mla_decode",
    "mla_decode_8_heads",
    "plan_decode",
    "schedule",
]

# `schedule` is the public name of a function, and of an argument.
_Schedule = Schedule


def _check_heads(plan: Schedule, heads: int, other: str) -> None:
    if plan.num_heads != heads:
        raise ValueError(
            f"schedule: got one for {plan.num_heads} heads, expected {heads}: use {other}"
        )


def mla_decode(
    schedule: _Schedule,
    q_rot: Float[Array, "batch tokens 16 64"],
    q_v: Float[Array, "batch tokens 16 512"],
    k_rot: Float[Array, "pages 256 64"],
    v: Float[Array, "pages 256 512"],
    table: Int[Array, "batch max_pages"],
    scale: float | Float[Array, ""],
    *,
    lengths: Int[Array, " batch"] | None = None,
    queue: str = "processors",
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch tokens 16 512"]:
    """Absorbed decode attention of 16 heads over pages of 256 tokens, by a schedule.

    Scores are (q_rot k_rot^T + q_v v^T) * scale in float32; the value is v itself. Sequence b's
    tokens lie in the pages table[b] (int32, any order, shared at will); its `new_tokens` query
    tokens are the last of them, causal among themselves. Slots and ids beyond a length are not
    used, whatever they hold. The schedule is a pytree: pass it to a jitted function as an argument,
    and schedules of like size share a compilation.
    lengths: int32 tokens of each sequence, new ones included, at most those that the schedule was
    made for; None takes these. A schedule made with room for more tokens serves many steps and all
    layers; a sequence that has outgrown it under jit, where nothing can raise, gives NaN.
    queue: "processors" walks each processor's queue of the table; "global" lets each take the next
    instruction of one queue, partials first, so that not all of them must run at a time.
    backend: "megakernel" is one launch, in which a reduction waits for its inputs for about a
    second at most, then gives NaN (`decode_with_signals` can say so); "triton" is a launch for
    partials and one for each level of reductions; "reference" is jnp.

    Returns out [batch, tokens, 16, 512] of q_v's dtype (float32, bfloat16 or float16, that of all
    arrays); a query without keys gives 0. Everything but shapes may be traced.
    Errors: ValueError (shape, or a value where it is concrete), TypeError (dtype),
    NotImplementedError (a backend that cannot run this, with the reason).
    Source: ThunderKittens' MLA decode.

    >>> import jax.numpy as jnp
    >>> plan = schedule([300, 5], new_tokens=1, num_processors=4)
    >>> q_rot, q_v = jnp.ones((2, 1, 16, 64)), jnp.ones((2, 1, 16, 512))
    >>> k_rot, v = jnp.ones((3, 256, 64)), jnp.ones((3, 256, 512))
    >>> table = jnp.array([[2, 0], [1, 0]])
    >>> mla_decode(plan, q_rot, q_v, k_rot, v, table, 0.07).shape
    (2, 1, 16, 512)
    """
    _check_heads(schedule, 16, "mla_decode_8_heads")
    return decode_by_schedule(
        *(schedule, q_rot, q_v, k_rot, v, table, scale),
        lengths=lengths,
        queue=queue,
        backend=backend,
        interpret=interpret,
    )[0]


def mla_decode_8_heads(
    schedule: _Schedule,
    q_rot: Float[Array, "batch tokens 8 64"],
    q_v: Float[Array, "batch tokens 8 512"],
    k_rot: Float[Array, "pages 256 64"],
    v: Float[Array, "pages 256 512"],
    table: Int[Array, "batch max_pages"],
    scale: float | Float[Array, ""],
    *,
    lengths: Int[Array, " batch"] | None = None,
    queue: str = "processors",
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch tokens 8 512"]:
    """`mla_decode` of 8 heads, by a schedule that was made with num_heads=8.

    >>> import jax.numpy as jnp
    >>> plan = schedule([300], new_tokens=2, num_processors=2, num_heads=8)
    >>> q_rot, q_v = jnp.ones((1, 2, 8, 64)), jnp.ones((1, 2, 8, 512))
    >>> k_rot, v = jnp.ones((2, 256, 64)), jnp.ones((2, 256, 512))
    >>> mla_decode_8_heads(plan, q_rot, q_v, k_rot, v, jnp.array([[1, 0]]), 0.07).shape
    (1, 2, 8, 512)
    """
    _check_heads(schedule, 8, "mla_decode")
    return decode_by_schedule(
        *(schedule, q_rot, q_v, k_rot, v, table, scale),
        lengths=lengths,
        queue=queue,
        backend=backend,
        interpret=interpret,
    )[0]


def decode_with_signals(
    signals: Int[Array, " words"],
    schedule: _Schedule,
    q_rot: Float[Array, "batch tokens heads 64"],
    q_v: Float[Array, "batch tokens heads 512"],
    k_rot: Float[Array, "pages 256 64"],
    v: Float[Array, "pages 256 512"],
    table: Int[Array, "batch max_pages"],
    scale: float | Float[Array, ""],
    *,
    lengths: Int[Array, " batch"] | None = None,
    queue: str = "processors",
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens heads 512"], Int[Array, " words"]]:
    """(`mla_decode` of the schedule's 16 or 8 heads, the signals for the next launch).

    signals: int32, from `make_signals`, then from the launch before: the words by which processors
    tell each other what is done. Handing them on spares each launch fresh ones; donate them to a
    jitted function, or carry them through a scan, and they stay where they are. `check_signals`
    raises on the host if a launch so far has waited in vain: call it once for many launches.
    Errors: as `mla_decode`'s; ValueError for signals of another schedule's size.

    >>> import jax.numpy as jnp
    >>> plan = schedule([300], new_tokens=1, num_processors=2, num_heads=8)
    >>> q_rot, q_v = jnp.ones((1, 1, 8, 64)), jnp.ones((1, 1, 8, 512))
    >>> arrays = q_rot, q_v, jnp.ones((2, 256, 64)), jnp.ones((2, 256, 512)), jnp.array([[1, 0]])
    >>> out, signals = decode_with_signals(make_signals(plan), plan, *arrays, 0.07)
    >>> check_signals(signals)
    >>> out.shape
    (1, 1, 8, 512)
    """
    out, signals_after = decode_by_schedule(
        *(schedule, q_rot, q_v, k_rot, v, table, scale),
        lengths=lengths,
        signals=signals,
        queue=queue,
        backend=backend,
        interpret=interpret,
    )
    assert signals_after is not None
    return out, signals_after
