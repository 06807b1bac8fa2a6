"""Shared fixtures: strict promotion everywhere and a fresh, printed, re-settable seed."""

import os
import random

# The interpreter of Mosaic GPU kernels blocks a CPU runtime thread for each warpgroup of a cluster
# that waits at a barrier; with one thread a core, a machine of two cores waits for ever. Read when
# jax starts its CPU client.
os.environ.setdefault("NPROC", "16")

import jax

# jax >= 0.11 imports this when it first interprets a kernel, and the configuration flag that it
# registers makes every jit cache miss once more: tests that count compilations want it early.
import jax.experimental.pallas.fuser
import numpy as np
import pytest

# A suite of tests in a module that pytest does not collect: its failures show values all the same.
pytest.register_assert_rewrite("paged_decode_suite")

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Meshes of up to eight devices; whatever names no mesh runs on the first, as before.
jax.config.update("jax_num_cpu_devices", 8)

# In the environment, so that parallel workers draw the same inputs as the header says.
SEED = int(os.environ.setdefault("MLA_JAX_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=float,
        default=1.0,
        metavar="F",
        help="of the tests that every version of jax can run, this share, drawn by the seed",
    )


def pytest_report_header(config: pytest.Config) -> str:
    share = float(config.option.share)
    drawn = "" if share == 1 else f", a share of {share:g} of the tests"
    return f"MLA_JAX_SEED={SEED} (set it to repeat this run's random inputs{drawn})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a share of the tests, and all that only some versions of jax can run."""
    share = float(config.option.share)
    if share == 1:
        return
    draw = random.Random(SEED)
    kept = [item for item in items if item.get_closest_marker("skipif") or draw.random() < share]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="module", autouse=True)
def no_programs_left():
    """A compiled program holds memory maps, of which Linux lets a process have 65,530: a worker
    that kept those of all modules would be killed."""
    yield
    jax.clear_caches()


@pytest.fixture
def seed() -> int:
    """This run's seed; the report header prints it, `MLA_JAX_SEED` fixes it."""
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
