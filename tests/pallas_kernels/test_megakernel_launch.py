"""The one launch: queues, signals that launches hand on, and waits that end.

The interpreter runs processors one after the other: a queue of all or a single processor's serves
every instruction, and what waits for a later processor waits in vain.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import QUICK_COMPILE, assert_within
from scheduled import SCALE, changed, dense, make_scheduled, without

from pallas_kernels.megakernel import check_signals, decode_by_schedule, make_signals
from pallas_kernels.megakernel.persistent import run_persistent
from pallas_kernels.megakernel.program import global_order
from pallas_kernels.megakernel.signals import LATE, LAUNCHES
from pallas_kernels.megakernel.simulator import legal_order
from pallas_kernels.schedule import Schedule, schedule

CLOSE = {0.99: 2e-6, 1.0: 1e-5}
LENGTHS, TOKENS = [900, 40, 700], 2


@functools.partial(jax.jit, static_argnames=("queue", "patience"), compiler_options=QUICK_COMPILE)
def launch(plan, signals, *args, queue="processors", patience=2):
    options = {"queue": queue, "interpret": True, "patience": patience}
    return run_persistent(plan, None, signals, *args, scale=jnp.float32(SCALE), **options)


def in_one_queue(plan: Schedule, rng) -> np.ndarray:
    """The table of one processor, in a random legal order."""
    words = [plan.instructions[place] for place in legal_order(plan, rng, queues=False)]
    return np.stack(words)[None]


@pytest.mark.parametrize(
    ("lengths", "tokens", "heads"), [(LENGTHS, 2, 16), ([3000], 1, 8), ([600, 0], 5, 8)]
)
def test_queue_of_a_processor(rng, lengths, tokens, heads):
    case = make_scheduled(rng, lengths, tokens, heads)
    plan = schedule(lengths, tokens, 20, heads)
    one = changed(plan, in_one_queue(plan, rng))
    out, signals = launch(one, None, *case.args)
    assert_within(out, dense(case, lengths), CLOSE)
    check_signals(signals)


def test_signals_serve_launch_after_launch(rng):
    """Also of other schedules of like size; each queue, whatever the launch before took."""
    signals = None
    for number, lengths in enumerate((LENGTHS, [700, 600, 40], LENGTHS), start=1):
        case = make_scheduled(rng, lengths, TOKENS, num_pages=9, max_pages=4)
        plan = schedule(lengths, TOKENS, 12)
        out, signals = launch(plan, signals, *case.args, queue="global")
        assert_within(out, dense(case, lengths), CLOSE)
        assert signals.shape == make_signals(plan).shape
        assert signals[LAUNCHES] == number
        check_signals(signals)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_dropped_producer(rng, fresh):
    """An error and NaN, also where an earlier launch has left the producer's signal."""
    case = make_scheduled(rng, LENGTHS, TOKENS)
    plan = schedule(LENGTHS, TOKENS, 12)
    table = in_one_queue(plan, rng)
    dropped = plan.dependencies[plan.uids[-1]][0]
    signals = None if fresh else launch(changed(plan, table), None, *case.args)[1]
    out, signals = launch(changed(plan, without(table, dropped)), signals, *case.args)
    broken = np.isnan(out).any(axis=(1, 2, 3))
    assert broken.sum() == 1
    assert_within(out[~broken], dense(case, LENGTHS)[~broken], CLOSE)
    users = [uid for uid, inputs in plan.dependencies.items() if dropped in inputs]
    assert signals[LATE] - 1 in users
    with pytest.raises(RuntimeError, match=rf"^signals: uid {signals[LATE] - 1} waited in vain"):
        check_signals(signals)


def test_a_wait_ends(rng):
    """A reduction waits for processors behind its own, which the interpreter runs too late."""
    case = make_scheduled(rng, [300], 2)
    plan = schedule([300], 2, 2)
    out, signals = launch(plan, None, *case.args, patience=3)
    # P1's reduction of token 1 comes after both partials, P0's of token 0 does not.
    assert np.isnan(out[0, 0]).all()
    assert_within(out[0, 1], dense(case, [300])[0, 1], CLOSE)
    assert signals[LATE] == 133


def test_what_waited_in_vain_is_not_used(rng):
    """Not even where the inputs would be there: without a poll nothing says so."""
    case = make_scheduled(rng, LENGTHS, TOKENS)
    plan = schedule(LENGTHS, TOKENS, 12)
    out, signals = launch(changed(plan, in_one_queue(plan, rng)), None, *case.args, patience=0)
    assert np.isnan(np.asarray(out)[[0, 2]]).all()
    assert_within(out[1], dense(case, LENGTHS)[1], CLOSE)  # whole in one partial
    assert signals[LATE] > 0


def test_global_order(rng):
    """Partials first, the longest before the others; then no reduction before its inputs."""
    for processors, tokens in ((60, 1), (132, 4), (3, 2)):
        plan = schedule(rng.integers(0, 20_000, 4).tolist(), tokens, processors)
        order = np.asarray(global_order(plan))
        words = plan.instructions.reshape(-1, 32)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(words)))
        queue = words[order]
        ops = queue[:, 0].tolist()
        partials, reductions = ops.count(1), ops.count(2)
        assert ops == [1] * partials + [2] * reductions + [0] * (len(ops) - partials - reductions)
        sizes = queue[:partials, 7] - queue[:partials, 6]
        assert (np.diff(sizes) <= 0).all()
        place = {uid: at for at, uid in enumerate(queue[: partials + reductions, 1].tolist())}
        for uid, inputs in plan.dependencies.items():
            assert all(place[producer] < place[uid] for producer in inputs)


def test_refusals(rng):
    case = make_scheduled(rng, [300], 2)
    plan = schedule([300], 2, 2)
    decode = functools.partial(decode_by_schedule, plan, *case.args, SCALE)
    text = 'the interpreter runs processors one after the other, which wait: use queue="global"'
    with pytest.raises(NotImplementedError, match=text):
        decode(backend="megakernel", interpret=True)
    for backend in ("triton", "reference"):
        with pytest.raises(NotImplementedError, match=r"level of reductions .* has no queue$"):
            decode(backend=backend, queue="global", interpret=True)
    text = r"^signals: got int32\[9\], expected int32\[96\], make_signals of this schedule$"
    with pytest.raises(ValueError, match=text):
        decode(signals=jnp.zeros(9, jnp.int32))
    with pytest.raises(TypeError, match=r"^signals: got a traced array"):
        jax.jit(check_signals)(make_signals(plan))


def test_backends_without_signals_hand_them_on(rng):
    case = make_scheduled(rng, [300], 2)
    plan = schedule([300], 2, 2)
    given = make_signals(plan) + 5
    _, signals = decode_by_schedule(
        plan, *case.args, scale=SCALE, signals=given, backend="reference"
    )
    np.testing.assert_array_equal(signals, given)
