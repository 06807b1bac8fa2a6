"""Generation by a schedule: the tokens of the other backends, one compilation, clear refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import Decoder, generate, presets
from mla_jax.decode_block import BLOCK_STEPS, decode_block
from mla_jax.generate import stream
from mla_jax.nn import scheduled
from pallas_kernels.megakernel import decode_by_schedule
from pallas_kernels.schedule.instructions import backward

CONFIG = dataclasses.replace(
    presets["tiny"],
    n_layers=2,
    eos_ids=(),
    inter_dim=64,
    mla=dataclasses.replace(
        presets["tiny"].mla,
        **{"dim": 64, "n_heads": 16, "q_lora_rank": 0, "kv_lora_rank": 512},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 64, "v_head_dim": 16},
    ),
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def interpreted(monkeypatch):
    """The one launch in the interpreter, of few processors, which it runs in turn."""
    run = functools.partial(decode_by_schedule)
    def decode(*args, **options):
        return run(*args, **(options | {"interpret": True, "queue": "global"}))
    monkeypatch.setattr(scheduled, "decode_by_schedule", decode)
    monkeypatch.setattr(backward, "PROCESSORS", 4)

def test_a(model, rng, interpreted):
    import time
    prompts = [rng.integers(0, 256, n).tolist() for n in (240, 7, 300)]
    t=time.time()
    want = generate(model, prompts, max_new_tokens=80)
    print(time.time()-t); t=time.time()
    got = generate(model, prompts, max_new_tokens=80, backend="megakernel")
    print(time.time()-t); t=time.time()
    print(decode_block._cache_size())
    assert want==got
