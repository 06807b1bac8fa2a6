"""What the kernels of both passes share: loads of a head's rows, scores, exponentials."""

import functools
import operator

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.causal_prefill.tiles import CausalProblem, split_width
from pallas_kernels.precision import precision_for

MAX_WIDTH = 256


def unsupported(problem: CausalProblem) -> str | None:
    """None if the kernels can run `problem`, else the reason why not."""
    if split_width(problem.width) is None:
        return (
            f"head width is {problem.width}, the Triton lowering needs a power of two from 16 "
            "or a sum of two"
        )
    if split_width(problem.value_width) != (problem.value_width,):
        return f"value width is {problem.value_width}, the kernel needs a power of two from 16"
    for name, width in (("head", problem.width), ("value", problem.value_width)):
        if width > MAX_WIDTH:
            return f"{name} width is {width}, a tile holds at most {MAX_WIDTH}"
    return None


def columns(width: int) -> list[tuple[int, int]]:
    """(start, size) of the parts in which a head of `width` is held."""
    parts = split_width(width)
    assert parts is not None
    return [(sum(parts[:i]), size) for i, size in enumerate(parts)]


def load_rows(ref, head, row, mask=None):
    """The parts of the rows `row` of one head; where not `mask`, zeros, whatever lies there.

    Numbers, not a slice: interpret mode refuses slices longer than the array, even where the loop
    around them never runs.
    """
    where = {} if mask is None else {"mask": mask[:, None], "other": 0}
    return tuple(
        plgpu.load(ref.at[row[:, None], head, start + jnp.arange(size)[None, :]], **where)
        for start, size in columns(ref.shape[2])
    )


def store_rows(ref, head, row, mask, parts):
    """The counterpart of `load_rows`."""
    for (start, size), part in zip(columns(ref.shape[2]), parts, strict=True):
        plgpu.store(
            ref.at[row[:, None], head, start + jnp.arange(size)[None, :]],
            part.astype(ref.dtype),
            mask=mask[:, None],
        )


def dot(a, b, *, trans_b=False):
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision_for(a.dtype))


def dot_parts(a, b):
    """a b^T of matrices that are held in parts."""
    products = [dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
    return functools.reduce(operator.add, products)
