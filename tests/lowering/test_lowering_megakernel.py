"""Decoding by a schedule lowers for an H200: to one launch, or to one of partials and one for each
level above."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Shape
from lowered import ints, kernels

from mla_jax import Decoder, ModelConfig, MoEConfig, PagedLatentCache, megakernel
from mla_jax.config import MLAConfig
from mla_jax.decode_block import decode_block
from mla_jax.sampling import Sampler
from pallas_kernels.schedule import CostModel, schedule

RECORD = {
    "record": ([4641, 45118, 1730, 1696], 4, 2),
    "one long": ([65536], 1, 3),
    "equal": ([512] * 64, 2, 1),
    "one a processor": ([4096] * 132, 4, 0),
    "ragged": ([256 + 12 * i for i in range(64)], 4, 1),
}


@pytest.mark.parametrize("name", RECORD)
def test_shapes_of_record(name):
    lengths, tokens, depth = RECORD[name]
    for heads, dtype in itertools.product((16, 8), ("bfloat16", "float16", "float32")):
        plan = schedule(lengths, tokens, num_heads=heads, cost_model=CostModel())
        assert plan.instructions.shape[0] == 132  # the abstract H200's
        decode = megakernel.mla_decode if heads == 16 else megakernel.mla_decode_8_heads
        rows, batch = (len(lengths), tokens, heads), len(lengths)

        def run(counts, *args, plan=plan, decode=decode, **how):
            return decode(plan, *args, lengths=counts, **how)

        args = (
            ints(batch),
            *(Shape((*rows, 64), dtype), Shape((*rows, 512), dtype)),
            *(Shape((600, 256, 64), dtype), Shape((600, 256, 512), dtype)),
            *(Shape((batch, 300), jnp.int32), Shape((), jnp.float32)),
        )
        levels = ["mla_paged_attention"] + ["mla_megakernel_reduction"] * depth
        assert kernels(functools.partial(run, backend="triton"), *args) == levels
        for how in ({}, {"queue": "global"}):
            assert kernels(functools.partial(run, **how), *args) == ["mla_megakernel"]


def test_processors_that_do_not_run_at_a_time():
    """More than cores: a launch for each level, unless one queue serves all."""
    plan = schedule([4096] * 4, 1, num_processors=140)
    args = (
        *(Shape((4, 1, 16, 64), "bfloat16"), Shape((4, 1, 16, 512), "bfloat16")),
        *(Shape((600, 256, 64), "bfloat16"), Shape((600, 256, 512), "bfloat16")),
        *(Shape((4, 16), jnp.int32), Shape((), jnp.float32)),
    )
    decode = functools.partial(megakernel.mla_decode, plan)
    assert kernels(decode, *args)[0] == "mla_paged_attention"
    assert kernels(functools.partial(decode, queue="global"), *args) == ["mla_megakernel"]
    text = "the schedule has 140 processors, which must run at a time, and the device 132 cores"
    with pytest.raises(NotImplementedError, match=text):
        kernels(functools.partial(decode, backend="megakernel"), *args)


def test_a_block_of_steps():
    """One launch a layer, of a dense one and one of experts, beside the kernels of the latter."""
    config = ModelConfig(
        vocab=512,
        n_layers=2,
        inter_dim=256,
        n_dense=1,
        mla=MLAConfig(dim=256, n_heads=8),
        moe=MoEConfig(n_routed=8, n_active=2, inter_dim=128, n_shared=1),
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(
        lambda: PagedLatentCache.create(
            config, num_pages=64, page_size=256, max_batch=3, max_pages=16
        )
    )
    plan = megakernel.plan_decode(config, [4000, None, 17], steps=32)

    definition, weights = nnx.split(model)

    def run(weights, tokens, cache, plan):
        options = {"sampler": Sampler(), "backend": "megakernel", "steps": 2}
        return decode_block(
            *(nnx.merge(definition, weights), tokens, cache, jax.random.key(0), plan), **options
        )

    names = kernels(run, weights, ints(3), cache, plan)
    experts = ["moe_route", "moe_hidden", "moe_output"]
    assert names == ["mla_megakernel", "mla_megakernel", *experts]
