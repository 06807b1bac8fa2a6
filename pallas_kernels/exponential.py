"""Powers of two, as the kernels' softmax takes them."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)
NEG_INF = float("-inf")


def exp2(x: Float[Array, "..."], interpret: bool) -> Float[Array, "..."]:
    """2**x of float32 in a Triton kernel, as one instruction: what underflows becomes 0.

    The lowering of jnp.exp2 keeps float32's subnormal results, at three more instructions each.
    """
    if interpret:
        return jnp.exp2(x)
    [y] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y
