"""What the device is, and which backend of an operation a call gets."""

import dataclasses
import re

import jax
import pytest
from interpreted import MOSAIC_GPU
from jax.sharding import AbstractMesh
from lowered import only

from pallas_kernels.backend import Backend, choose, explain, needs_gpu
from pallas_kernels.device import Device, current_device
from pallas_kernels.paged_attention import PagedProblem
from pallas_kernels.paged_decode import BACKENDS, mosaic_gpu
from pallas_kernels.paged_prefill import BACKENDS as PREFILL_BACKENDS

H200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132)
CPU = Device(platform="cpu", kind="cpu", num_cores=None)


def abstract(kind: str = "NVIDIA H200", cores: int = 132, platform: str = "gpu"):
    return jax.sharding.use_abstract_mesh(only(kind, cores, platform))


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


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 PCIe", True),
        ("NVIDIA H100 NVL", True),
        ("NVIDIA H800", True),
        ("NVIDIA H20", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("NVIDIA GB200", False),
        ("NVIDIA L40S", False),
        ("NVIDIA GeForce RTX 4090", False),
        ("cpu", False),
    ],
)
def test_is_hopper(kind, hopper):
    assert Device(platform="gpu", kind=kind, num_cores=None).is_hopper is hopper


def ran(*args):
    return args


FAST = Backend(
    name="triton",
    run=ran,
    unfit=needs_gpu,
    unsupported=lambda problem: "too odd" if problem % 2 else None,
)
SLOW = Backend(name="reference", run=ran)
WIDE = Backend(
    name="mosaic_gpu",
    run=ran,
    unfit=needs_gpu,
    outrun=lambda problem: "too small" if problem < 10 else None,
)


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
        known = "mosaic_gpu, megakernel, triton, reference"
        text = f"backend: got {name!r}, expected None or one of {known}"
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

    def test_outrun(self):
        """It is taken where it is fastest, where it is named, and where nothing else can."""
        with abstract():
            assert choose("op", (WIDE, FAST, SLOW), 12, None) is WIDE
            assert choose("op", (WIDE, FAST, SLOW), 8, None) is FAST
            assert choose("op", (WIDE, FAST, SLOW), 7, None) is SLOW
            assert choose("op", (WIDE, FAST), 7, None) is WIDE
            assert choose("op", (WIDE, FAST, SLOW), 8, "mosaic_gpu") is WIDE
        assert choose("op", (WIDE, FAST, SLOW), 12, None) is SLOW

    def test_all_are_outrun(self):
        both = (WIDE, dataclasses.replace(WIDE, name="triton"))
        with abstract():
            assert choose("op", both, 2, None) is WIDE


def problem(
    heads: int = 16,
    latent: int = 512,
    rope: int = 64,
    page_size: int = 64,
    tokens: int = 1,
    batch: int = 1,
) -> PagedProblem:
    return PagedProblem(
        op="paged_decode",
        batch=batch,
        tokens=tokens,
        heads=heads,
        latent=latent,
        rope=rope,
        page_size=page_size,
        dtype="bfloat16",
        num_ids=9,
    )


@pytest.mark.parametrize("backends", [BACKENDS, PREFILL_BACKENDS], ids=["decode", "prefill"])
class TestExplain:
    def test_on_a_gpu(self, backends):
        reasons = explain(backends, problem(), H200)
        assert (reasons["triton"], reasons["reference"]) == (None, None)
        assert list(reasons)[-2:] == ["triton", "reference"]
        assert explain(backends, problem(rope=0), H200)["triton"] is None

    def test_on_a_cpu(self, backends):
        reasons = explain(backends, problem(), CPU)
        assert reasons.pop("mosaic_gpu", None) in (None, "needs a Hopper GPU, this is a cpu (cpu)")
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
        for sizes in ({}, {"heads": 128}, {"latent": 48}, {"rope": 0}, {"latent": 64, "heads": 64}):
            with abstract():
                chosen = choose("op", backends, problem(**sizes), None)
                assert explain(backends, problem(**sizes), current_device())[chosen.name] is None


class TestMosaicDecode:
    """What `paged_decode` says of its Mosaic GPU backend."""

    def test_explain(self):
        def reason(device: Device) -> str | None:
            return explain(BACKENDS, problem(), device)["mosaic_gpu"]

        assert next(iter(explain(BACKENDS, problem(), H200))) == "mosaic_gpu"
        if MOSAIC_GPU:
            assert reason(H200) is None
        else:
            assert str(reason(H200)).startswith(f"jax is {jax.__version__}, Mosaic GPU's copies")
        a100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", num_cores=108)
        assert reason(a100) == f"needs a Hopper GPU, this is a {a100}"
        assert reason(CPU) == "needs a Hopper GPU, this is a cpu (cpu)"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtype": "float32"}, "the dtype is float32, the tensor cores take"),
            *(({"latent": size}, f"latent is {size}, two halves") for size in (64, 192, 320, 640)),
            *(
                ({"rope": size}, f"rope is {size}, a box of columns is 64")
                for size in (16, 32, 128)
            ),
            *(
                ({"page_size": size}, f"the page size is {size},")
                for size in (1, 4, 12, 24, 48, 96)
            ),
        ],
        ids=str,
    )
    def test_unsupported(self, monkeypatch, changes, reason):
        monkeypatch.setattr(mosaic_gpu, "OLDEST_JAX", (0, 0))
        said = mosaic_gpu.unsupported(dataclasses.replace(problem(), **changes))
        assert said is not None
        assert said.startswith(reason)

    @pytest.mark.parametrize(
        "changes",
        [
            {"dtype": "float16"},
            *({"latent": size} for size in (128, 256, 384, 512)),
            {"rope": 0},
            *({"page_size": size} for size in (8, 16, 32, 64, 128, 192, 1024)),
            *({"heads": heads} for heads in (1, 7, 126, 1000)),
            {"tokens": 8},
        ],
        ids=str,
    )
    def test_supported(self, monkeypatch, changes):
        monkeypatch.setattr(mosaic_gpu, "OLDEST_JAX", (0, 0))
        assert mosaic_gpu.unsupported(dataclasses.replace(problem(), **changes)) is None

    def test_unsupported_by_an_old_jax(self, monkeypatch):
        monkeypatch.setattr(mosaic_gpu, "OLDEST_JAX", (99, 0))
        said = mosaic_gpu.unsupported(problem())
        assert said is not None
        assert said.startswith(f"jax is {jax.__version__}, Mosaic GPU's copies")

    def test_outrun(self):
        """A few rows, heads times query tokens, of a few requests."""
        few, requests = mosaic_gpu.FEW_ROWS, mosaic_gpu.FEW_REQUESTS
        for heads, tokens, batch in ((1, 1, 1), (few, 1, requests), (few // 8, 8, 2)):
            said = mosaic_gpu.outrun(problem(heads=heads, tokens=tokens, batch=batch))
            assert said is not None
            assert said.startswith(f"{batch} requests of {heads * tokens} query rows")
        for heads, tokens, batch in ((few + 1, 1, 1), (few, 2, 1), (1, 1, requests + 1)):
            assert mosaic_gpu.outrun(problem(heads=heads, tokens=tokens, batch=batch)) is None

    def test_order(self):
        few, requests = mosaic_gpu.TWINS_ROWS, mosaic_gpu.TWINS_REQUESTS
        for heads, batch, want in (
            (few, requests, "twins"),
            (few + 1, requests, "line"),
            (few, requests + 1, "line"),
            (64, 1, "line"),
            (65, 1, "seesaw"),
        ):
            tiles = mosaic_gpu.default_mosaic_tiles(problem(heads=heads, batch=batch))
            assert (tiles.order, tiles.cluster) == (want, 2 if want == "seesaw" else 1)

    def test_order_over_e4m3(self):
        """By the copy engine where it can bring pages and scales, and few rows unpack them."""
        most, few = mosaic_gpu.TURNS_ROWS, mosaic_gpu.TWINS_ROWS
        for heads, page_size, latent, want, gathers in (
            (most, 64, 512, "turns", False),
            (most + 1, 8, 512, "rows", False),
            (few, 64, 128, "rows", False),
            (few + 1, 64, 512, "seesaw", True),
            (most, 1, 512, "turns", True),
            (few, 8, 384, "twins", True),
        ):
            sizes = {"heads": heads, "page_size": page_size, "latent": latent}
            slots = dataclasses.replace(problem(**sizes), scaled="slot")
            tiles = mosaic_gpu.default_mosaic_tiles(slots)
            assert (tiles.order, tiles.ahead > 0, tiles.cluster) == (want, gathers, 1)

    def test_choice(self):
        for heads, want in ((16, "triton"), (128, "mosaic_gpu" if MOSAIC_GPU else "triton")):
            with abstract():
                assert choose("op", BACKENDS, problem(heads=heads), None).name == want
            with abstract("NVIDIA A100-SXM4-80GB", 108):
                assert choose("op", BACKENDS, problem(heads=heads), None).name == "triton"
            assert choose("op", BACKENDS, problem(heads=heads), None).name == "reference"
