"""Mosaic GPU kernels in Pallas' interpreter, which only notes a race: here one fails the test."""

# What older versions of jax lack.
# pyright: reportAttributeAccessIssue=false

import contextlib
from collections.abc import Iterator

import jax
import pytest

from pallas_kernels.paged_decode.mosaic_gpu import OLDEST_JAX

MOSAIC_GPU = jax.__version_info__ >= OLDEST_JAX
needs_mosaic_gpu = pytest.mark.skipif(
    not MOSAIC_GPU, reason=f"jax {jax.__version__} cannot lower or interpret Mosaic GPU: 0.11 can"
)


@contextlib.contextmanager
def no_races() -> Iterator[None]:
    """AssertionError if a kernel that was interpreted inside has a race, or if none was.

    The interpreter prints a race and sets `races_found` in a state that every kernel makes anew; of
    jax 0.12 on, it raises one.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, race_detection_state

    states = []

    class Noted(race_detection_state.GPURaceDetectionState):
        def __init__(self, **fields):
            super().__init__(**fields)
            states.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_callbacks, "GPURaceDetectionState", Noted)
        try:
            yield
            jax.effects_barrier()
        except jax.errors.JaxRuntimeError as error:
            if "RACE DETECTED" not in str(error):
                raise
            print(error)
            raise AssertionError("RACE DETECTED, see the output") from error
        finally:
            # A kernel that raised leaves its memory to the next one.
            gpu_callbacks.reset_gpu_interpret_mode_state()
    assert states, "no kernel ran in the interpreter of Mosaic GPU"
    assert not any(state.races_found for state in states), "RACE DETECTED, see the output"
