"""An H200 that is not there: what the lowering tests lower for."""

import jax
import pytest
from lowered import H200


@pytest.fixture(autouse=True)
def h200():
    with jax.sharding.use_abstract_mesh(H200):
        yield
