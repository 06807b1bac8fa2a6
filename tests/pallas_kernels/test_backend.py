"""What the device is, and which backend of an operation a call gets."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.backend import Backend, choose, explain, needs_gpu
from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_attention import PagedProblem
from pallas_kernels.paged_decode import BACKENDS
from pallas_kernels.paged_prefill import BACKENDS as PREFILL_BACKENDS

H200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132)
CPU = Device(platform="cpu", kind="cpu", num_cores=None)


def abstract(kind: str = "NVIDIA H200", cores: int = 132, platform: str = "gpu"):
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, cores, platform))
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.fixture
def cpu():
    return jax.devices("cpu")[0]


class TestCurrentDevice:
    def test_default(self, cpu):
        with jax.default_device(cpu):
            device = current_device()
        assert (device.platform, device.kind) == ("cpu", cpu.device_kind)
        assert str(device) == f"{cpu.device_kind} (cpu)"

    def test_default_by_name(self, cpu):
        with jax.default_device("cpu"):
            assert current_device().kind == cpu.device_kind

    def test_without_a_default(self):
        first = jax.devices()[0]
        assert current_device().platform == first.platform
        assert current_device().kind == first.device_kind

    def test_abstract(self):
        with abstract():
            assert current_device() == H200
        assert current_device() != H200

    def test_abstract_wins_over_the_default(self, cpu):
        with jax.default_device(cpu), abstract():
            assert current_device() == H200

    def test_innermost_abstract(self):
        with abstract(), abstract("NVIDIA B200", 148):
            assert current_device().num_cores == 148

    def test_while_tracing(self):
        seen = []

        @jax.jit
        def run(x):
            seen.append(current_device())
            return x

        with abstract():
            run.trace(1.0)
        assert seen == [H200]

    def test_a_mesh_of_devices(self, cpu):
        """A concrete mesh tells its devices' kind; a mesh without a device tells nothing."""
        with jax.set_mesh(jax.make_mesh((1,), ("model",), devices=[cpu])):
            assert current_device().platform == "cpu"
        with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("model",))):
            assert current_device().platform == jax.devices()[0].platform


def ran(*args):
    return args


FAST = Backend(
    name="triton",
    run=ran,
    unfit=needs_gpu,
    unsupported=lambda problem: "too odd" if problem % 2 else None,
)
SLOW = Backend(name="reference", run=ran)


class TestChoose:
    def test_first_that_can(self):
        assert choose("op", (FAST, SLOW), 2, None) is SLOW
        with abstract():
            assert choose("op", (FAST, SLOW), 2, None) is FAST
            assert choose("op", (FAST, SLOW), 3, None) is SLOW

    def test_named(self):
        """A name needs no such device: the kernel may be lowered here, or interpreted."""
        assert choose("op", (FAST, SLOW), 2, "triton") is FAST
        with abstract():
            assert choose("op", (FAST, SLOW), 2, "reference") is SLOW

    @pytest.mark.parametrize("name", ["cuda", "", "Triton", "reference "])
    def test_unknown_name(self, name):
        text = f"backend: got {name!r}, expected None or one of triton, reference"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            choose("op", (FAST, SLOW), 2, name)

    def test_named_but_unsupported(self):
        text = "^backend 'triton' cannot run this op: too odd$"
        with pytest.raises(NotImplementedError, match=text):
            choose("op", (FAST, SLOW), 3, "triton")

    def test_named_but_absent(self):
        with pytest.raises(NotImplementedError, match=r"^backend 'triton' has no op: it has refer"):
            choose("op", (SLOW,), 2, "triton")

    def test_none_can(self):
        with pytest.raises(NotImplementedError, match=r"^op: no backend can run 3; see explain"):
            choose("op", (FAST,), 3, None)


def problem(latent: int = 512, rope: int = 64) -> PagedProblem:
    q_nope, q_pe = jnp.zeros((1, 1, 16, latent)), jnp.zeros((1, 1, 16, rope))
    pool = jnp.zeros((9, 1, latent))
    return PagedProblem.of("paged_decode", q_nope, q_pe, pool, jnp.zeros(9, jnp.int32), 1)


@pytest.mark.parametrize("backends", [BACKENDS, PREFILL_BACKENDS], ids=["decode", "prefill"])
class TestExplain:
    def test_on_a_gpu(self, backends):
        assert explain(backends, problem(), H200) == {"triton": None, "reference": None}
        assert explain(backends, problem(rope=0), H200)["triton"] is None

    def test_on_a_cpu(self, backends):
        reasons = explain(backends, problem(), CPU)
        assert reasons == {"triton": "needs a GPU, this is a cpu (cpu)", "reference": None}

    @pytest.mark.parametrize(
        ("sizes", "reason"),
        [
            ({"latent": 48}, "latent is 48, the Triton lowering needs a power of two from 16"),
            ({"rope": 8}, "rope is 8, the Triton lowering needs a power of two from 16"),
            ({"latent": 1024}, "latent is 1024, a tile holds at most 512"),
        ],
    )
    def test_unsupported(self, backends, sizes, reason):
        assert explain(backends, problem(**sizes), H200)["triton"] == reason

    def test_none_never_picks_what_explain_refuses(self, backends):
        for sizes in ({}, {"latent": 48}, {"rope": 0}):
            with abstract():
                chosen = choose("op", backends, problem(**sizes), None)
                assert explain(backends, problem(**sizes), current_device())[chosen.name] is None
