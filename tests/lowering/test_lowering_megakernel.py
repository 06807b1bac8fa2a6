"""Decoding by a schedule lowers for an H200: a launch of partials, one for each level above."""

import itertools

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from lowered import ints, kernels

from mla_jax import megakernel
from pallas_kernels.schedule import schedule

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
        plan = schedule(lengths, tokens, num_heads=heads)
        assert plan.instructions.shape[0] == 132  # the abstract H200's
        decode = megakernel.mla_decode if heads == 16 else megakernel.mla_decode_8_heads
        rows, batch = (len(lengths), tokens, heads), len(lengths)

        def run(instructions, counts, *args, plan=plan, decode=decode):
            return decode(plan, *args, lengths=counts)

        names = kernels(
            run,
            plan.instructions,
            ints(batch),
            *(Shape((*rows, 64), dtype), Shape((*rows, 512), dtype)),
            *(Shape((600, 256, 64), dtype), Shape((600, 256, 512), dtype)),
            *(Shape((batch, 300), jnp.int32), Shape((), jnp.float32)),
        )
        assert names == ["mla_paged_attention"] + ["mla_megakernel_reduction"] * depth
