"""The check for races finds one, and does not find one where there is none."""

# What older versions of jax lack.
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import needs_mosaic_gpu, no_races
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

pytestmark = needs_mosaic_gpu


def hand_over(x: jax.Array, *, wait: bool) -> jax.Array:
    """A copy of x: one warpgroup writes it to shared memory, from which another reads it."""

    def kernel(x, out, shared, written):
        thread = lax.axis_index("test_warpgroup")

        @pl.when(thread == 0)
        def _():
            shared[...] = x[...]
            plgpu.commit_smem()
            plgpu.barrier_arrive(written)

        @pl.when(thread == 1)
        def _():
            if wait:
                plgpu.barrier_wait(written)
            out[...] = shared[...]
            if not wait:
                plgpu.barrier_wait(written)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_threads=2,
        thread_name="test_warpgroup",
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(x)


def test_a_barrier_orders():
    x = jnp.arange(128, dtype=jnp.float32)
    with no_races():
        np.testing.assert_array_equal(hand_over(x, wait=True), x)


def test_a_race_fails(capsys):
    x = jnp.arange(128, dtype=jnp.float32)
    with pytest.raises(AssertionError, match="RACE DETECTED"), no_races():
        jax.block_until_ready(hand_over(x, wait=False))
    assert "RACE DETECTED" in capsys.readouterr().out


def test_nothing_interpreted_fails():
    with pytest.raises(AssertionError, match="no kernel ran"), no_races():
        pass
