"""Generation by a schedule: the tokens of the other backends, one compilation, clear refusals."""

import dataclasses
import functools
import json
import os
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scheduled import changed, without

from mla_jax import Decoder, PagedLatentCache, decode_step, generate, presets, save_checkpoint
from mla_jax.bench.timing import compilations
from mla_jax.cli.main import main
from mla_jax.decode_block import BLOCK_STEPS, decode_block
from mla_jax.decode_plan import DecodePlan, plan_decode, plan_room
from mla_jax.megakernel import check_signals
from mla_jax.nn import scheduled
from mla_jax.sharding import make_mesh
from pallas_kernels.megakernel import decode_by_schedule
from pallas_kernels.schedule.instructions import backward

CONFIG = dataclasses.replace(
    presets["tiny"],
    n_layers=2,
    eos_ids=tuple(range(0, 256, 8)),
    inter_dim=64,
    n_dense=2,
    moe=None,
    mla=dataclasses.replace(
        presets["tiny"].mla,
        **{"dim": 64, "n_heads": 16, "q_lora_rank": 0, "kv_lora_rank": 512},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 16},
    ),
)
LENGTHS, NEW = (240, 7, 270), BLOCK_STEPS + 5
# Of schedules: few processors, and little scratch, which the interpreter copies again and again.
SMALL = {"PROCESSORS": 4, "FIRST_REDUCTION": 8}
SEED = int(os.environ["MLA_JAX_SEED"])
generation = import_module("mla_jax.generate")  # whose name in the package is the function's


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    state, rng = nnx.state(model), np.random.default_rng(SEED)
    for _, variable in nnx.to_flat_state(state):
        value = rng.standard_normal(variable.shape, np.float32)
        variable.set_value(jnp.asarray(value * variable.shape[-1] ** -0.5))
    nnx.update(model, state)
    return model


@pytest.fixture
def prompts(rng) -> list[list[int]]:
    """What the command line makes of as many letters."""
    return [[0, *rng.integers(97, 123, n - 1).tolist()] for n in LENGTHS]


@pytest.fixture
def interpreted(small, monkeypatch) -> list[str | None]:
    """The one launch in the interpreter; the backends that were asked for."""
    asked = []

    def decode(*args, backend, **options):
        asked.append(backend)
        options |= {"interpret": True, "queue": "global"}
        return decode_by_schedule(*args, backend="megakernel", **options)

    monkeypatch.setattr(scheduled, "decode_by_schedule", decode)
    return asked


@pytest.fixture
def small(monkeypatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(backward, name, value)


def test_same_tokens_by_one_program(model, prompts, interpreted, monkeypatch, capsys, tmp_path):
    """With a plan for each of two blocks; and at the command line, where rows end at end tokens."""
    want = generate(model, prompts, max_new_tokens=NEW, ignore_eos=True, page_size=256)
    options = {"max_new_tokens": NEW, "ignore_eos": True, "backend": "megakernel"}
    planned = []

    def plan_block(config, lengths, *, steps, like):
        planned.append(lengths)
        return plan_decode(config, lengths, steps=steps, like=like)

    monkeypatch.setattr(generation, "plan_decode", plan_block)
    before = compilations(decode_block)
    assert generate(model, prompts, **options) == want
    assert planned == [[n + i * BLOCK_STEPS for n in LENGTHS] for i in range(2)]
    assert set(interpreted) == {"megakernel"}

    save_checkpoint(model, tmp_path / "model")
    argv = ["generate", "--checkpoint", str(tmp_path / "model"), "--json"]
    argv += ["--max-new-tokens", str(NEW), "--backend", "megakernel"]
    for prompt in prompts:
        argv += ["--prompt", bytes(prompt[1:]).decode()]
    assert main(argv) == 0
    sequences = json.loads(capsys.readouterr().out)["sequences"]
    for row, sequence in zip(want, sequences, strict=True):
        end = next((i for i, token in enumerate(row) if token in CONFIG.eos_ids), NEW)
        assert sequence["tokens"] == row[:end]
    assert compilations(decode_block) == before + 1


def test_a_lost_producer_raises_on_the_host(model, prompts, interpreted, monkeypatch):
    """Once, after the block: its tokens are not handed out."""

    def plan_without_one(*args, **options):
        plan = plan_decode(*args, **options)
        schedule = plan.schedule
        lost = next(inputs[0] for inputs in schedule.dependencies.values())
        return DecodePlan(changed(schedule, without(schedule.instructions, lost)), plan.signals)

    monkeypatch.setattr(generation, "plan_decode", plan_without_one)
    blocks = generation.stream(
        model, prompts, max_new_tokens=NEW, backend="megakernel", ignore_eos=True
    )
    next(blocks)  # prefill
    with pytest.raises(RuntimeError, match=r"^signals: uid \d+ waited in vain"):
        next(blocks)


def cache_of(
    lengths: list[int], page_size: int = 256, dtype: str | None = None
) -> PagedLatentCache:
    """A cache of zeros with two pages a row, the last row's table empty."""
    batch = len(lengths)
    table = np.arange(2 * batch, dtype=np.int32).reshape(batch, 2)[::-1].copy()
    table[-1] = -1
    sizes = {"num_pages": 2 * batch, "page_size": page_size, "max_batch": batch, "max_pages": 2}
    cache = PagedLatentCache.create(CONFIG, **sizes, mesh=None, dtype=dtype)
    return cache.with_rows(jnp.asarray(table), jnp.asarray(lengths, jnp.int32))


def test_a_loop_of_ones_own(small, model, rng):
    """Logits of steps by one plan are those without; a row without a page stands still."""
    lengths, steps = [255, 290, 50], 3
    cache = cache_of(lengths)
    noise = [rng.standard_normal(pool.shape, np.float32) for pool in (*cache.ckv, *cache.kpe)]
    ckv, kpe = (tuple(map(jnp.asarray, part)) for part in (noise[:2], noise[2:]))
    cache = plain = dataclasses.replace(cache, ckv=ckv, kpe=kpe)
    plan = plan_decode(CONFIG, [255, 290, None], steps=steps)
    step = jax.jit(decode_step)
    for i in range(steps + 1):
        tokens = jnp.asarray(rng.integers(0, 256, 3), jnp.int32)
        want, plain = step(model, tokens, plain)
        logits, cache, plan = step(model, tokens, cache, plan)
        assert cache.lengths.tolist() == plain.lengths.tolist() == [256 + i, 291 + i, 50]
        assert jnp.isfinite(logits[2]).all()
        if i < steps:
            np.testing.assert_allclose(logits[:2], want[:2], atol=1e-4)
    assert jnp.isnan(logits[:2]).all()  # the plan had room for one step fewer
    check_signals(plan.signals)


def test_plans_of_all_blocks_share_a_compilation(rng):
    """Also when rows end: what jit looks at is that of the plan with room for all."""
    lengths = rng.integers(1, 9000, 6).tolist()
    room = plan_room(CONFIG, lengths, steps=700)
    structure = jax.tree.structure(room)
    rows: list[int | None] = list(lengths)
    plan = room
    for ended in [None, None, *rng.permutation(5).tolist()]:
        rows = [None if i == ended or n is None else n + 100 for i, n in enumerate(rows)]
        plan = plan_decode(CONFIG, rows, steps=32, like=plan)
        assert plan.schedule.lengths.tolist() == [0 if n is None else n + 32 for n in rows]
        assert jax.tree.structure(plan) == structure
        assert plan.schedule.instructions.shape == room.schedule.instructions.shape
    small = plan_decode(CONFIG, [1] * 6, steps=1)
    assert jax.tree.structure(small) != structure  # without `like`


MLA = CONFIG.mla


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"n_heads": 4}, {}, "n_heads is 4, expected 16 or 8"),
        ({"kv_lora_rank": 64}, {}, "kv_lora_rank is 64, expected 512"),
        ({"qk_rope_head_dim": 32}, {}, "qk_rope_head_dim is 32, expected 64"),
        ({}, {"page_size": 64}, "page_size is 64, expected 256"),
        ({}, {"kv_dtype": "fp8"}, "the cache's dtype is float8_e4m3fn, expected float32"),
        ({}, {"mesh": "data"}, "it runs on one device, and a mesh is set"),
    ],
)
def test_refusals_come_before_the_work(monkeypatch, change, options, reason):
    config = dataclasses.replace(CONFIG, mla=dataclasses.replace(MLA, **change))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))  # whose weights nobody needs
    monkeypatch.setattr(generation, "prefill_chunk", lambda *_, **__: pytest.fail("prefill"))
    given: dict[str, Any] = {"mesh": make_mesh(data=2)} if "mesh" in options else options
    text = f"^backend 'megakernel' cannot run this decode_step: {reason}$"
    with pytest.raises(NotImplementedError, match=text):
        generate(model, [[1]], max_new_tokens=4, backend="megakernel", **given)


def test_refusals_of_a_step(model):
    tokens, cache = jnp.zeros(3, jnp.int32), cache_of([1, 1, 1])
    plan = plan_decode(CONFIG, [1, 1, 1], steps=1)
    with pytest.raises(
        ValueError, match=r"^plan: got None with backend 'megakernel', expected one"
    ):
        decode_step(model, tokens, cache, backend="megakernel")
    other = plan_decode(CONFIG, [1, 1], steps=1)
    text = r"plan: got one for \(rows, tokens, heads\) \(2, 1, 16\), expected \(3, 1, 16\)"
    with pytest.raises(ValueError, match=f"^{text}"):
        decode_step(model, tokens, cache, other)
    for unfit, reason in (
        (cache_of([1, 1, 1], page_size=64), "page_size is 64"),
        (cache_of([1, 1, 1], dtype="float8_e4m3fn"), "the cache's dtype is float8_e4m3fn"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            decode_step(model, tokens, unfit, plan)
    with jax.set_mesh(make_mesh(data=1)), pytest.raises(NotImplementedError, match="one device"):
        decode_step(model, tokens, cache, plan)
    step = functools.partial(decode_step, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"^backend 'mosaic_gpu' has no mla_decode"):
        jax.eval_shape(step, model, tokens, cache, plan)
    with pytest.raises(ValueError, match=r"^lengths: got -1 for row 1, expected None, or 0"):
        plan_decode(CONFIG, [3, -1], steps=1)
    with pytest.raises(ValueError, match=r"^steps: got 0, expected at least 1"):
        plan_decode(CONFIG, [3], steps=0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "cannot run this decode_step: kv_lora_rank is 64, expected 512"),  # the shipped model
        (["--kv-dtype", "fp8"], "--kv-dtype: got fp8 with --backend megakernel"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_line(capsys, argv, words):
    assert main(["generate", "--backend", "megakernel", "--prompt", "a", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
