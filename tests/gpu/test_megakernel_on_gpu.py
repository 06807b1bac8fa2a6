"""Decoding by a schedule on the chip: every backend, and the synchronisation of the one launch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from on_gpu import needs_gpu
from oracles import assert_within, float64
from scheduled import SCALE, changed, dense, make_scheduled, without

from mla_jax import Decoder, generate, presets
from mla_jax.bench.schedules import SHAPES
from mla_jax.bench.timing import compilations
from mla_jax.decode_block import BLOCK_STEPS, decode_block
from mla_jax.megakernel import (
    check_signals,
    decode_with_signals,
    make_signals,
    mla_decode,
    schedule,
)
from pallas_kernels.megakernel.signals import LAUNCHES

pytestmark = needs_gpu

WAYS = {
    "megakernel": {"backend": "megakernel"},
    "global queue": {"backend": "megakernel", "queue": "global"},
    "triton": {"backend": "triton"},
}
# In units of an output's standard deviation, which shrinks with the keys. The inputs' rounding is
# the oracle's too, the probabilities' and the result's is not.
BOUNDS = {
    "bfloat16": {0.99: 1.5e-2, 1.0: 6e-2},
    "float16": {0.99: 2e-3, 1.0: 8e-3},
    "float32": {0.99: 1e-5, 1.0: 1e-4},
}


@functools.partial(jax.jit, static_argnames=("backend", "queue"), donate_argnames="signals")
def launch(signals, plan, lengths, *args, backend="megakernel", queue="processors"):
    return decode_with_signals(
        *(signals, plan, *args), scale=SCALE, lengths=lengths, backend=backend, queue=queue
    )


def assert_close(out, want: np.ndarray, dtype: str) -> None:
    assert str(out.dtype) == dtype
    # Each sequence by its own: a long one's outputs are small.
    for got, wanted in zip(float64(out), want, strict=True):
        scale = wanted.std() or 1.0
        assert_within(got / scale, wanted / scale, BOUNDS[dtype])


@pytest.mark.parametrize("heads", [16, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_record(rng, name, heads):
    lengths, tokens = SHAPES[name]
    case = make_scheduled(rng, lengths, tokens, heads, dtype="bfloat16")
    plan, want = schedule(lengths, tokens, num_heads=heads), dense(case, lengths)
    for way in WAYS.values():
        out, signals = launch(make_signals(plan), plan, None, *case.args, **way)
        assert_close(out, want, "bfloat16")
        check_signals(signals)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 8), (2, 16), (3, 16), (4, 8), (5, 16)])
def test_dtypes_and_tokens(rng, tokens, heads, dtype):
    """Trees, a direct partial, page edges, less keys than tokens, and none."""
    lengths = [4500, 257, 256, 40, tokens - 1, 0, 1]
    case = make_scheduled(rng, lengths, tokens, heads, dtype=dtype)
    plan, want = schedule(lengths, tokens, num_heads=heads), dense(case, lengths)
    for way in WAYS.values():
        out, _ = launch(make_signals(plan), plan, None, *case.args, **way)
        assert_close(out, want, dtype)


@pytest.mark.parametrize("name", WAYS)
def test_lengths(rng, name):
    """Shorter sequences than planned, partials clipped to nothing, and one that has outgrown."""
    planned, tokens = [9000, 700, 300, 5], 2
    plan = schedule(planned, tokens)
    signals = make_signals(plan)
    for lengths in ([8500, 650, 290, 5], [33, 1, 2, 0], planned, [9001, 700, 300, 5]):
        case = make_scheduled(rng, lengths, tokens, dtype="bfloat16", num_pages=48, max_pages=40)
        counts = jnp.asarray(lengths, jnp.int32)
        out, signals = launch(signals, plan, counts, *case.args, **WAYS[name])
        want = dense(case, lengths)
        fits = np.asarray(lengths) <= planned
        assert_close(out[fits], want[fits], "bfloat16")
        assert np.isnan(float64(out[~fits])).all()
        check_signals(signals)


@pytest.mark.parametrize("queue", ["processors", "global"])
def test_a_thousand_launches(rng, queue):
    """Random batches in turns, their signals handed on: the same bits each time, and no wait."""
    batches = []
    signals, launches = jnp.zeros(0, jnp.int32), 0
    for _ in range(10):
        lengths = (10 ** rng.uniform(1, 4.5, 4)).astype(int).tolist()
        case = make_scheduled(rng, lengths, 4, dtype="bfloat16", num_pages=520, max_pages=130)
        plan = schedule(lengths, 4)
        if signals.shape != make_signals(plan).shape:
            signals, launches = make_signals(plan), 0
        out, signals = launch(signals, plan, None, *case.args, queue=queue)
        launches += 1
        assert_close(out, dense(case, lengths), "bfloat16")
        batches.append((plan, case.args, out))
    same = jnp.bool_(True)
    for i in range(1000):
        plan, args, first = batches[i % len(batches)]
        if signals.shape != make_signals(plan).shape:
            signals, launches = make_signals(plan), 0
        out, signals = launch(signals, plan, None, *args, queue=queue)
        launches += 1
        same &= (out == first).all()
        if i % 100 == 99:
            check_signals(signals)
    assert same
    assert signals[LAUNCHES] == launches


@pytest.mark.parametrize("queue", ["processors", "global"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_dropped_producer_ends_in_the_error(rng, queue, fresh):
    """Whatever signals earlier launches have left; the other sequence is as it was."""
    lengths = [9000, 3000]
    case = make_scheduled(rng, lengths, 2, dtype="bfloat16")
    plan = schedule(lengths, 2)
    signals = make_signals(plan)
    if not fresh:
        for _ in range(3):
            out, signals = launch(signals, plan, None, *case.args, queue=queue)
        check_signals(signals)
    # uid 0 is the first sequence's first partial, of which both tokens have a use.
    broken = changed(plan, without(plan.instructions, 0))
    out, signals = launch(signals, broken, None, *case.args, queue=queue)
    with pytest.raises(RuntimeError, match=r"^signals: uid \d+ waited in vain"):
        check_signals(signals)
    assert np.isnan(float64(out[0])).all()
    assert_close(out[1:], dense(case, lengths)[1:], "bfloat16")


def test_in_a_scan_and_without_signals(rng):
    """One plan for a loop of growing lengths, on the device; fresh signals in each call."""
    final = [5000, 300, 70]
    case = make_scheduled(rng, final, 1, dtype="bfloat16")
    plan = schedule([length + 64 for length in final], 1)
    steps = jnp.asarray([[4998, 298, 68], [4999, 299, 69], final], jnp.int32)

    @jax.jit
    def loop(plan, steps, *args):
        def step(_, lengths):
            return None, mla_decode(plan, *args, scale=SCALE, lengths=lengths, backend="megakernel")

        return jax.lax.scan(step, None, steps)[1]

    for lengths, out in zip(steps.tolist(), loop(plan, steps, *case.args), strict=True):
        assert_close(out, dense(case, lengths), "bfloat16")


@pytest.mark.parametrize("heads", [16, 8])
def test_generation_by_a_schedule(seed, rng, heads):
    """The tokens of split-KV decode, over blocks with a plan each, by one program."""
    widths = {"n_heads": heads, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    mla = dataclasses.replace(presets["tiny"].mla, **widths)
    model = Decoder(dataclasses.replace(presets["tiny"], mla=mla), rngs=nnx.Rngs(seed))
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 250, 1500)]
    options = {"max_new_tokens": 3 * BLOCK_STEPS, "ignore_eos": True}
    before = compilations(decode_block)
    made = generate(model, prompts, backend="megakernel", **options)
    assert compilations(decode_block) == before + 1
    assert made == generate(model, prompts, backend="triton", page_size=256, **options)
