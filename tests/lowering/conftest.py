"""An H200 that is not there: what the lowering tests lower for."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh


@pytest.fixture(autouse=True)
def h200():
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        yield
