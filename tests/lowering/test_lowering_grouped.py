"""What `mla-jax bench grouped` times of ours lowers for an H200, at the sizes that it measures."""

import jax
import pytest
from lowered import cuda, kernels

from mla_jax.bench import grouped

KERNELS = {
    "grouped_decode": ["mla_grouped_decode", "mla_paged_merge"],
    "sparse_prefill": ["mla_sparse_prefill"],
}


@pytest.mark.parametrize("shape", grouped.SHAPES.values(), ids=list(grouped.SHAPES))
def test_programs(shape):
    """Nobody names Triton here: on a GPU it is what a call gets."""
    assert grouped.backend_for(shape, None) == "triton"
    inputs = jax.eval_shape(shape.draw, jax.random.key(0))
    for name, program in shape.programs(None).items():
        if program.ours:
            found = kernels(program.call, *program.arguments(inputs))
            assert found == KERNELS[shape.op], name
        elif name.startswith("xla"):  # cuDNN asks the GPU while it is traced
            text = cuda(program.call, *program.arguments(inputs))
            assert ("gather" in text) == (name == "xla")
