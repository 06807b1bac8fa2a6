"""The megakernel's instructions one after the other in float64 NumPy, in any order that is legal.

This is what the synchronisation between processors allows: an instruction runs once those it
depends on have, and once those before it in its processor's queue have.
"""

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.schedule import Schedule
from pallas_kernels.schedule.instructions.words import (
    FIRST_DEPENDENCY,
    NO_OP,
    PARTIAL,
    QUERY_TOKENS,
)

State = tuple[np.ndarray, np.ndarray]
"""(out [heads, latent], base-2 lse [heads])."""


def legal_order(
    schedule: Schedule, rng: np.random.Generator, *, queues: bool = True
) -> list[tuple[int, int]]:
    """(processor, place) of every instruction, in a random legal order.

    queues: processors keep the order of their queues; False: any processor takes any instruction
    whose dependencies are done, as from a global queue.
    """
    table = np.asarray(schedule.instructions)
    dependencies = schedule.dependencies
    left = [list(range(np.count_nonzero(queue[:, 0]))) for queue in table]
    done: set[int] = set()
    order = []
    while any(left):
        ready = [
            (processor, place)
            for processor, places in enumerate(left)
            for place in (places[:1] if queues else places)
            if done.issuperset(dependencies.get(int(table[processor, place, 1]), ()))
        ]
        processor, place = ready[rng.integers(len(ready))]
        left[processor].remove(place)
        done.add(int(table[processor, place, 1]))
        order.append((processor, place))
    return order


def _softmax(scores: np.ndarray, values: np.ndarray) -> State:
    """Scores to base 2 [heads, keys]; without keys 0 and -inf."""
    if scores.shape[1] == 0:
        return np.zeros((len(scores), values.shape[1])), np.full(len(scores), -np.inf)
    top = scores.max(axis=1)
    weights = np.exp2(scores - top[:, None])
    total = weights.sum(axis=1)
    return weights @ values / total[:, None], np.log2(total) + top


def _merge(a: State, b: State) -> State:
    top = np.maximum(a[1], b[1])
    shift = np.where(np.isneginf(top), 0.0, top)
    weight_a, weight_b = np.exp2(a[1] - shift), np.exp2(b[1] - shift)
    total = np.where(np.isneginf(top), 1.0, weight_a + weight_b)
    out = a[0] * weight_a[:, None] + b[0] * weight_b[:, None]
    return out / total[:, None], np.where(np.isneginf(top), top, np.log2(total) + top)


def simulate(
    schedule: Schedule,
    q_rot: Float[np.ndarray, "batch tokens heads rope"],
    q_v: Float[np.ndarray, "batch tokens heads latent"],
    k_rot: Float[np.ndarray, "pages page rope"],
    v: Float[np.ndarray, "pages page latent"],
    table: Int[np.ndarray, "batch max_pages"],
    scale: float,
    *,
    lengths: Int[np.ndarray, " batch"] | None = None,
    order: list[tuple[int, int]] | None = None,
) -> Float[np.ndarray, "batch tokens heads latent"]:
    """The output in float64; what nobody writes is NaN.

    order: instructions as (processor, place in its queue); None takes `legal_order`'s.
    Errors: RuntimeError for an instruction that runs before one that it depends on.
    """
    instructions = np.asarray(schedule.instructions)
    tokens, page = q_v.shape[1], v.shape[1]
    out = np.full(q_v.shape, np.nan)
    scratch: dict[tuple[int, int], State] = {}

    def write(batch: int, token: int, state: State) -> None:
        if batch >= 0:
            out[batch, token] = state[0]
        else:
            scratch[-batch - 1, token] = state

    def partial(words: list[int]) -> None:
        to_batch, to_token, batch, q_seq, start, end, length = words[2:9]
        if lengths is not None:
            length = int(lengths[batch])
            end = min(end, length)
        for w in range(min(QUERY_TOKENS, tokens - q_seq)):
            token = q_seq + w
            keys = np.arange(start, max(start, min(end, length - (tokens - token - 1))))
            at = table[batch][keys // page], keys % page
            values = v[at].astype(np.float64)
            scores = q_v[batch, token] @ values.T + q_rot[batch, token] @ k_rot[at].T
            write(to_batch, to_token + w, _softmax(scores * scale / np.log(2), values))

    def reduction(words: list[int]) -> None:
        _, _, count, to_batch, token = words[:5]
        dependencies = words[FIRST_DEPENDENCY:][: count + 1]
        missing = [uid for uid in dependencies if (uid, token) not in scratch]
        if missing:
            raise RuntimeError(f"uid {words[1]} ran before {missing[0]}, on which it depends")
        state = scratch[dependencies[0], token]
        for uid in dependencies[1:]:
            state = _merge(state, scratch[uid, token])
        write(to_batch, token, state)

    for place in order or legal_order(schedule, np.random.default_rng(0)):
        words = instructions[place].tolist()
        if words[0] != NO_OP:
            (partial if words[0] == PARTIAL else reduction)(words)
    return out
