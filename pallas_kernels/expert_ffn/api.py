"""The one entry of the routed experts' feed-forward."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Backend, choose, needs_gpu
from pallas_kernels.block_scaled import BlockScaled, scale_shape
from pallas_kernels.checks import FLOATS
from pallas_kernels.expert_ffn import triton
from pallas_kernels.expert_ffn.reference import expert_ffn_reference
from pallas_kernels.expert_ffn.tiles import ExpertProblem
from pallas_kernels.precision import FP8

# Fastest first.
BACKENDS = (
    Backend(
        name="triton", run=triton.expert_ffn_triton, unsupported=triton.unsupported, unfit=needs_gpu
    ),
    Backend(
        name="reference",
        run=lambda *args, partial, interpret: expert_ffn_reference(*args, partial=partial),
    ),
)


def _check_scaling(name: str, weight: Array | BlockScaled, like: Array | BlockScaled) -> None:
    """Weights are all scaled as gate_up is, `like`, or none is."""

    def scaling(weight: Array | BlockScaled) -> str:
        if not isinstance(weight, BlockScaled):
            return "no scales"
        power = "powers of two" if weight.power_of_two else "any scales"
        return f"scales of blocks {weight.block_size} for activations with {power}"

    if scaling(weight) != scaling(like):
        raise TypeError(f"{name}: got {scaling(weight)}, expected gate_up's {scaling(like)}")
    if isinstance(weight, BlockScaled):
        shape = scale_shape(weight.shape, weight.block_size)
        if weight.scales.shape != shape:
            raise ValueError(f"{name}: got scales {weight.scales.shape}, expected {shape}")


def expert_ffn(
    x: Float[Array, "tokens dim"],
    expert_ids: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    gate_up: Float[Array, "experts 2 inter dim"] | BlockScaled,
    down: Float[Array, "experts dim inter"] | BlockScaled,
    shared: tuple[Float[Array, "2 wide dim"] | BlockScaled, Float[Array, "dim wide"] | BlockScaled]
    | None = None,
    *,
    partial: bool = False,
    backend: str | None = None,
    interpret: bool = False,
) -> Float[Array, "tokens dim"]:
    """sum over a token's experts e of weight * down[e] (silu(gate[e] x) * (up[e] x)).

    gate_up holds both matrices of an expert, gate first; weights are float32, ids int32 and all
    below `experts`. `shared` is the (gate_up, down) of experts that every token passes through
    with weight 1, side by side: wide is a multiple of inter. Of the routed experts the Triton
    kernels read only those that some token chose. Products accumulate in float32; the hidden
    layer is rounded to x's dtype, as is the result. The reference is differentiable.
    All weights may be block-scaled FP8, of one block size: x and the hidden layer are then
    quantised by groups of 128 columns as `scaled_product` does it, and weights stay FP8 in memory.
    partial: some ids may be `experts`, for experts that are not here; these pairs add nothing.
    Errors: ValueError (shape), TypeError (dtype), NotImplementedError (backend).
    """
    experts, _, inter, dim = gate_up.shape
    tokens, active = expert_ids.shape
    expected = {
        "x": (x, (tokens, dim)),
        "weights": (weights, (tokens, active)),
        "gate_up": (gate_up, (experts, 2, inter, dim)),
        "down": (down, (experts, dim, inter)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if 0 in expert_ids.shape:
        raise ValueError(f"expert_ids: got shape {expert_ids.shape}, expected no empty axis")
    named: list[tuple[str, Array | BlockScaled]] = [("gate_up", gate_up), ("down", down)]
    if shared is not None:
        wide = shared[0].shape[1]
        for name, array, shape in (
            ("shared[0]", shared[0], (2, wide, dim)),
            ("shared[1]", shared[1], (dim, wide)),
        ):
            if array.shape != shape or wide % inter:
                raise ValueError(
                    f"{name}: got shape {array.shape}, expected {shape}, wide a multiple of {inter}"
                )
            named.append((name, array))
    if str(x.dtype) not in FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {', '.join(FLOATS)}")
    for name, array in named:
        _check_scaling(name, array, gate_up)
    weight_dtype = FP8 if isinstance(gate_up, BlockScaled) else x.dtype
    for name, array, dtype in (
        *((name, array, weight_dtype) for name, array in named),
        ("weights", weights, jnp.float32),
        ("expert_ids", expert_ids, jnp.int32),
    ):
        if array.dtype != dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {jnp.dtype(dtype)}")
    problem = ExpertProblem.of(expert_ids, gate_up, shared)
    chosen = choose("expert_ffn", BACKENDS, problem, backend)
    return chosen.run(
        x, expert_ids, weights, gate_up, down, shared, partial=partial, interpret=interpret
    )
