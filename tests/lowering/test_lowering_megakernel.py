"""Decoding by a schedule lowers for an H200: to one launch, or to one of partials and one for each
level above."""

import functools
import itertools

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from lowered import ints, kernels

from mla_jax import megakernel
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
