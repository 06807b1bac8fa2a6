"""The compiled programs of generation: a chunk of prefill, its first tokens, a block of steps."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mla_jax.cache import PagedLatentCache
from mla_jax.decode_plan import DecodePlan
from mla_jax.nn import Decoder, decode_step, prefill
from mla_jax.sampling import Sampler
from mla_jax.sharding.layout import replicated, rows_together

BLOCK_STEPS = 32
"""Decode steps a compiled block: pages are reserved before it, tokens are read after it."""

PREFILL_CHUNK = 512
"""Most prompt tokens a row brings to one prefill call."""


@functools.partial(jax.jit, static_argnames="backend", donate_argnames=("cache", "logits"))
def prefill_chunk(
    model: Decoder,
    tokens: Int[Array, "batch tokens"],
    counts: Int[Array, " batch"],
    cache: PagedLatentCache,
    logits: Float[Array, "batch vocab"],
    *,
    backend: str | None,
) -> tuple[Float[Array, "batch vocab"], PagedLatentCache]:
    """One chunk of every row's prompt; the logits of rows that bring no token stay."""
    new_logits, cache = prefill(model, tokens, cache, counts=counts, backend=backend)
    return jnp.where((counts > 0)[:, None], new_logits, logits), cache


@functools.partial(
    jax.jit, static_argnames=("sampler", "backend", "steps"), donate_argnames="cache"
)
def decode_block(
    model: Decoder,
    tokens: Int[Array, " batch"],
    cache: PagedLatentCache,
    key: Key[Array, ""],
    plan: DecodePlan | None = None,
    *,
    sampler: Sampler,
    backend: str | None = None,
    steps: int = BLOCK_STEPS,
) -> tuple[Int[Array, "steps batch"], PagedLatentCache, *tuple[DecodePlan, ...]]:
    """`steps` decode steps in one compiled call, sampling on the device; the cache is donated.

    tokens: each row's newest token. Returns the tokens that follow, one row a step; the cache; and
    the plan, if there is one. Under `jax.set_mesh` it is one program on all devices, and every one
    of them has all the tokens.
    """

    def step(carry, key):
        tokens, cache, *plans = carry
        logits, *state = decode_step(model, tokens, cache, *plans, backend=backend)
        tokens = _sampled(sampler, logits, key)
        return (tokens, *state), tokens

    first = (tokens, cache) if plan is None else (tokens, cache, plan)
    (_, cache, *plans), generated = lax.scan(step, first, jax.random.split(key, steps))
    return replicated(generated), cache, *plans


@functools.partial(jax.jit, static_argnames="sampler")
def first_tokens(
    logits: Float[Array, "batch vocab"], key: Key[Array, ""], *, sampler: Sampler
) -> Int[Array, " batch"]:
    """What follows the prompts, whole on every device."""
    return replicated(_sampled(sampler, logits, key))


def _sampled(
    sampler: Sampler, logits: Float[Array, "batch vocab"], key: Key[Array, ""]
) -> Int[Array, " batch"]:
    # The greatest of parts is the greatest of all, but a sorted or a drawn row must be together.
    return sampler(logits if sampler.temperature == 0 else rows_together(logits), key)
