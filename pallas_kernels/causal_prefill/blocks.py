"""What the kernels of both passes share: loads of a head's rows, scores, exponentials."""

import functools
import operator

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.causal_prefill.tiles import CausalProblem, split_width
from pallas_kernels.precision import precision_for

MAX_WIDTH = 256


def unsplit_width(width: int) -> str | None:
    """None if a head of `width` can be held in parts, else the reason why not."""
    if split_width(width) is None:
        return (
            f"head width is {width}, the Triton lowering needs a power of two from 16 "
            "or a sum of two"
        )
    return None


def unsupported(problem: CausalProblem) -> str | None:
    """None if the kernels can run `problem`, else the reason why not."""
    if reason := unsplit_width(problem.width):
        return reason
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


def load_parts(ref, index, mask=None):
    """The parts of ref[*index, :], whose rows stand as [:, None]; where not `mask`, zeros.

    Numbers, not a slice: interpret mode refuses slices longer than the array, even where the loop
    around them never runs.
    """
    where = {} if mask is None else {"mask": mask[:, None], "other": 0.0}
    return tuple(
        plgpu.load(ref.at[*index, start + jnp.arange(size)[None, :]], **where)
        for start, size in columns(ref.shape[-1])
    )


def store_parts(ref, index, mask, parts):
    """The counterpart of `load_parts`: columns behind the parts' are left as they are."""
    start = 0
    for part in parts:
        column = start + jnp.arange(part.shape[1])[None, :]
        plgpu.store(ref.at[*index, column], part.astype(ref.dtype), mask=mask[:, None])
        start += part.shape[1]


def load_rows(ref, head, row, mask=None):
    """The parts of the rows `row` of one head of ref [rows, heads, width]."""
    return load_parts(ref, (row[:, None], head), mask)


def store_rows(ref, head, row, mask, parts):
    """The counterpart of `load_rows`."""
    store_parts(ref, (row[:, None], head), mask, parts)


def dot(a, b, *, trans_b=False):
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision_for(a.dtype))


def dot_parts(a, b):
    """a b^T of matrices that are held in parts."""
    products = [dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
    return functools.reduce(operator.add, products)
