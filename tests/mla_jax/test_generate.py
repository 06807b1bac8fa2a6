"""Generation: what the loop makes is what the whole-sequence model would say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import Decoder, OutOfPagesError, generate, presets
from mla_jax.bench.timing import compilations
from mla_jax.generate import BLOCK_STEPS, PREFILL_CHUNK, decode_block, stream
from mla_jax.sampling import Sampler

CONFIG = dataclasses.replace(presets["tiny"], n_layers=2, eos_ids=())


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def greedy_by_whole_sequences(model: Decoder, prompt: list[int], made: list[int]) -> np.ndarray:
    """The token that the cache-less model would take at each step that led to `made`."""
    whole = jnp.asarray([prompt + made], jnp.int32)
    logits = jax.jit(lambda m, t: m(t))(model, whole)
    return np.asarray(logits[0].argmax(axis=-1))[len(prompt) - 1 : -1]


def test_greedy_equals_the_model_without_a_cache(model, rng):
    lengths = (1, 7, 64, 65, PREFILL_CHUNK + 9)
    prompts = [rng.integers(0, 256, n).tolist() for n in lengths]
    made = generate(model, prompts, max_new_tokens=BLOCK_STEPS + 5, page_size=16)
    for prompt, row in zip(prompts, made, strict=True):
        assert len(row) == BLOCK_STEPS + 5
        agree = greedy_by_whole_sequences(model, prompt, row) == np.asarray(row)
        # Two logits closer than rounding may come out in either order.
        assert agree.mean() > 0.95


@pytest.mark.parametrize(("prompt", "page_size"), [(9, 4), (1, 1)])
def test_a_cache_of_just_the_tokens(model, rng, prompt, page_size):
    """Fewer slots than the power of two of a prefill chunk."""
    prompts = [rng.integers(0, 256, prompt).tolist()]
    roomy = generate(model, prompts, max_new_tokens=2, page_size=64)
    assert generate(model, prompts, max_new_tokens=2, page_size=page_size) == roomy


def test_rows_do_not_see_each_other(model, rng):
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 40)]
    together = generate(model, prompts, max_new_tokens=20)
    alone = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert together == alone


def test_the_seed_repeats_and_changes_a_sample(model):
    def sample(seed: int) -> list[list[int]]:
        return generate(model, [[1, 2, 3]], max_new_tokens=24, temperature=1.0, seed=seed)

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_an_end_token_stops_its_row_only(rng):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    prompts = [rng.integers(0, 256, n).tolist() for n in (5, 9)]
    free = generate(model, prompts, max_new_tokens=50)
    stop = free[0][20]
    model.config = dataclasses.replace(CONFIG, eos_ids=(stop,))

    def cut(row: list[int]) -> list[int]:
        return row[: row.index(stop)] if stop in row else row

    assert generate(model, prompts, max_new_tokens=50) == [cut(row) for row in free]
    assert generate(model, prompts, max_new_tokens=50, ignore_eos=True) == free


def test_pages_return_when_a_row_ends(model):
    blocks = list(stream(model, [[1], [2]], max_new_tokens=BLOCK_STEPS * 2, page_size=16))
    assert [sum(map(len, block.tokens)) for block in blocks] == [2, 64, 62]
    assert [block.pages_in_use for block in blocks] == [2, 6, 8]
    assert blocks[-1].finished == [True, True]


def test_one_program_serves_all_lengths(model):
    before = compilations(decode_block)
    generate(model, [[1], [2, 3], [4]], max_new_tokens=6 * BLOCK_STEPS)
    assert compilations(decode_block) == before + 1


def test_nothing_meets_the_host_inside_a_block(model):
    """The compiled block has no callback, infeed or outfeed, and its inputs are on the device."""
    from mla_jax import PagedLatentCache

    cache = PagedLatentCache.create(CONFIG, num_pages=4, max_batch=2, max_pages=2)
    lowered = decode_block.lower(
        model, jnp.zeros(2, jnp.int32), cache, jax.random.key(0), sampler=Sampler(temperature=1.0)
    )
    text = lowered.compile().as_text() or ""
    assert text.count("while(") >= 1
    for word in ("callback", "infeed", "outfeed", " send(", " recv("):
        assert word not in text


def test_an_empty_prompt_begins_with_the_begin_token(model):
    assert CONFIG.bos_id is not None
    begun = generate(model, [[CONFIG.bos_id]], max_new_tokens=8)
    assert generate(model, [[]], max_new_tokens=8) == begun


def test_no_new_tokens(model):
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "prompts: got none, expected at least one"),
        ([[1], [256]], {}, r"prompts\[1\]: got token 256, expected 0 to 255"),
        ([[-1]], {}, r"prompts\[0\]: got token -1, expected 0 to 255"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens: got -1, expected 0 or more"),
        ([[1] * 2000], {}, "prompts: got 2000 tokens and 64 new ones, expected at most 2048"),
        ([[1]], {"backend": "cuda"}, "backend: got 'cuda', expected None or one of"),
        ([[1]], {"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_refusals(model, prompts, arguments, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        generate(model, prompts, **{"max_new_tokens": 64, **arguments})


def test_more_sequences_than_pages(model):
    with pytest.raises(OutOfPagesError, match=r"^out of pages: needed 1, free 0, total 2$"):
        generate(model, [[1], [2], [3]], max_new_tokens=4, num_pages=2)


def test_a_backend_that_cannot_says_why():
    mla = dataclasses.replace(CONFIG.mla, kv_lora_rank=48)
    config = dataclasses.replace(CONFIG, mla=mla, moe=None)
    model = Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match=r"latent is 48, .* power of two from 16"):
        generate(model, [[1]], max_new_tokens=4, backend="triton")
