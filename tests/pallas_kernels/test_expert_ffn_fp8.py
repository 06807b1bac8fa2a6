"""`expert_ffn` with weights in FP8: both backends against float64 NumPy, and its errors."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_weights import assert_rows_near, product, random_blocks
from oracles import QUICK_COMPILE, assert_within, float64

from pallas_kernels.block_scaled import BlockScaled
from pallas_kernels.expert_ffn import expert_ffn

SHARE = 0.75
"""Tokens that no number between two of FP8 moves: all but one in some hundreds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    x: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    gate_up: BlockScaled
    down: BlockScaled
    shared: tuple[BlockScaled, BlockScaled] | None

    @property
    def args(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def poisoned(weight: BlockScaled, used: np.ndarray) -> BlockScaled:
    """NaN in experts that no token chose."""
    idle = jnp.asarray(~np.isin(np.arange(weight.shape[0]), used))
    idle = idle.reshape(-1, *(1 for _ in weight.shape[1:]))
    return dataclasses.replace(
        weight,
        values=jnp.where(idle, jnp.asarray(jnp.nan, weight.dtype), weight.values),
        scales=jnp.where(idle, jnp.nan, weight.scales),
    )


def make(
    rng: np.random.Generator,
    *,
    tokens: int = 5,
    active: int = 2,
    experts: int = 4,
    shared: int = 0,
    dim: int = 144,
    inter: int = 160,
    block: tuple[int, int] = (128, 128),
    power_of_two: bool = False,
    poison: bool = False,
) -> Case:
    blocks = functools.partial(random_blocks, rng, block=block, power_of_two=power_of_two)
    ids = np.stack([rng.permutation(experts)[:active] for _ in range(tokens)])
    gate_up, down = blocks(experts, 2, inter, dim), blocks(experts, dim, inter)
    if poison:
        gate_up, down = poisoned(gate_up, ids), poisoned(down, ids)
    wide = shared * inter
    return Case(
        x=jnp.asarray(rng.standard_normal((tokens, dim)), jnp.float32),
        expert_ids=jnp.asarray(ids, jnp.int32),
        weights=jnp.asarray(rng.uniform(0, 1, ids.shape), jnp.float32),
        gate_up=gate_up,
        down=down,
        shared=(blocks(2, wide, dim), blocks(dim, wide)) if shared else None,
    )


def gated(x: np.ndarray, gate_up: BlockScaled, down: BlockScaled) -> np.ndarray:
    gate, up = product(x, gate_up[0]), product(x, gate_up[1])
    return product(gate / (1 + np.exp(-gate)) * up, down)


def mixture(case: Case) -> np.ndarray:
    x, out = float64(case.x), np.zeros(case.x.shape)
    for token, ids in enumerate(np.asarray(case.expert_ids)):
        row = x[token : token + 1]
        for slot, expert in enumerate(ids):
            share = float64(case.weights)[token, slot]
            out[token] += share * gated(row, case.gate_up[expert], case.down[expert])[0]
        if case.shared is not None:
            out[token] += gated(row, *case.shared)[0]
    return out


BACKENDS = pytest.mark.parametrize(
    ("backend", "interpret"), [("reference", False), ("triton", True)], ids=["reference", "triton"]
)


@functools.cache
def jitted(backend: str, interpret: bool, **options):
    call = functools.partial(expert_ffn, backend=backend, interpret=interpret, **options)
    return jax.jit(call, compiler_options=QUICK_COMPILE)


def run(case: Case, backend: str, interpret: bool, **options) -> jax.Array:
    return jitted(backend, interpret, **options)(*case.args)


@BACKENDS
@pytest.mark.parametrize(
    "sizes",
    [
        {"active": 1, "dim": 128, "inter": 128, "shared": 1},
        {"tokens": 7},  # ragged edges
        {"tokens": 20, "experts": 2, "power_of_two": True},  # tiles of several pairs
        {"shared": 2, "dim": 48, "inter": 256},  # shared ones side by side
        {"dim": 80, "inter": 64, "block": (48, 32)},  # blocks across tiles, of few columns
        {"dim": 384, "inter": 32, "block": (64, 256)},  # of more columns than a group
    ],
    ids=["few-pairs", "ragged", "tiles", "shared", "small-blocks", "wide-blocks"],
)
def test_mixture(rng, backend, interpret, sizes):
    # The reference runs all experts; the kernels must not even read those of no token.
    case = make(rng, poison=backend == "triton", **sizes)
    assert_rows_near(run(case, backend, interpret), mixture(case), share=SHARE)


@BACKENDS
def test_parts_add_up(rng, backend, interpret):
    """Experts in two places: each adds what its own do, and nothing for another's."""
    case = make(rng, tokens=7, active=3, experts=6)
    total = np.zeros(case.x.shape)
    for first in (0, 3):
        here = (case.expert_ids >= first) & (case.expert_ids < first + 3)
        part = dataclasses.replace(
            case,
            expert_ids=jnp.where(here, case.expert_ids - first, 3),
            gate_up=case.gate_up[first : first + 3],
            down=case.down[first : first + 3],
        )
        total += float64(run(part, backend, interpret, partial=True))
    assert_rows_near(total, mixture(case), share=SHARE)


def test_bfloat16(rng):
    """Activations as a model has them: the hidden layer is rounded once more."""
    case = make(rng, shared=1)
    case = dataclasses.replace(case, x=case.x.astype(jnp.bfloat16))
    out = run(case, "triton", True)
    assert out.dtype == jnp.bfloat16
    assert_within(out, mixture(case), {0.5: 5e-2, 1.0: 0.4})


def without_scales(weight: BlockScaled) -> jax.Array:
    return weight.dequantized(jnp.float32)


ERRORS = {
    "mixed": (
        TypeError,
        lambda case: {"down": without_scales(case.down)},
        "down: got no scales, expected gate_up's scales of blocks (128, 128) for activations with "
        "any scales",
    ),
    "other_blocks": (
        TypeError,
        lambda case: {"down": dataclasses.replace(case.down, block_size=(64, 128))},
        "down: got scales of blocks (64, 128) for activations with any scales, expected gate_up's "
        "scales of blocks (128, 128) for activations with any scales",
    ),
    "scales": (
        ValueError,
        lambda case: {"down": dataclasses.replace(case.down, scales=jnp.ones((4, 1, 2)))},
        "down: got scales (4, 1, 2), expected (4, 2, 2)",
    ),
    "dtype": (
        TypeError,
        lambda case: {
            "gate_up": dataclasses.replace(case.gate_up, values=without_scales(case.gate_up))
        },
        "gate_up: got dtype float32, expected float8_e4m3fn",
    ),
}


@pytest.mark.parametrize(("error", "changes", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(rng, error, changes, text):
    case = make(rng)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        expert_ffn(*dataclasses.replace(case, **changes(case)).args)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"block": (128, 40)},
            "a block of weights is (128, 40), the kernel needs columns in multiples of 16",
        ),
        ({"shared": 2}, "inter is 160, which cuts groups of 128 where shared experts meet"),
    ],
)
def test_unsupported_by_triton(rng, sizes, text):
    case = make(rng, **sizes)
    with pytest.raises(NotImplementedError, match=f"this expert_ffn: {re.escape(text)}$"):
        expert_ffn(*case.args, backend="triton", interpret=True)
    assert_rows_near(run(case, "reference", False), mixture(case), share=SHARE)
