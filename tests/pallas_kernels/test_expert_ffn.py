"""`expert_ffn`: one suite for every backend, its gradient, its errors, and the plan of tiles."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh
from oracles import QUICK_COMPILE, ExpertCase, assert_within, make_experts, mixture

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.tiles import plan_row_tiles

BOUNDS = {
    "float32": {0.99: 3e-6, 1.0: 1e-5},
    "bfloat16": {0.99: 2e-2, 1.0: 6e-2},
    "float16": {0.99: 2e-3, 1.0: 8e-3},
}


@functools.cache
def jitted(backend: str, interpret: bool, **options):
    run = functools.partial(expert_ffn, backend=backend, interpret=interpret, **options)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


def random_ids(rng: np.random.Generator, tokens: int, active: int, experts: int) -> np.ndarray:
    """Distinct experts for each token, as a router chooses them."""
    return np.stack([rng.permutation(experts)[:active] for _ in range(tokens)])


class ExpertSuite:
    """What every backend does; a subclass names one."""

    backend: str
    interpret: bool
    unused: float
    """What experts hold that no token chose."""

    def check(self, rng, expert_ids: np.ndarray, **sizes) -> None:
        case = make_experts(rng, expert_ids, unused=self.unused, **sizes)
        out = jitted(self.backend, self.interpret)(*case.args)
        assert out.dtype == case.x.dtype
        assert_within(out, mixture(case), BOUNDS[str(out.dtype)])

    @pytest.mark.parametrize("tokens", [1, 2, 7])
    def test_few_tokens(self, rng, tokens):
        self.check(rng, random_ids(rng, tokens, 3, 8), experts=8)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, rng, dtype):
        self.check(rng, random_ids(rng, 24, 2, 6), experts=6, shared=1, dtype=dtype)

    @pytest.mark.parametrize("tokens", [15, 16, 17, 33])
    def test_all_on_one_expert(self, rng, tokens):
        """Its pairs just fit tiles of 16, or just not."""
        self.check(rng, np.full((tokens, 1), 2), experts=5)

    @pytest.mark.parametrize("tokens", [32, 33, 64, 65])
    def test_larger_tiles(self, rng, tokens):
        """Two pairs a token over two experts: tiles of 32 and 64 rows."""
        self.check(rng, random_ids(rng, tokens, 2, 2), experts=2)

    def test_one_expert(self, rng):
        self.check(rng, np.zeros((40, 1), np.int32), experts=1)

    def test_skewed(self, rng):
        """Groups of 0, 1, 15, 16, 17 and 30 pairs, in random order."""
        ids = np.repeat([1, 2, 4, 5, 7], [1, 15, 16, 17, 30])
        self.check(rng, rng.permutation(ids)[:, None], experts=9)

    @pytest.mark.parametrize(("tokens", "shared"), [(1, 1), (3, 2), (17, 2), (70, 1)])
    def test_shared_experts(self, rng, tokens, shared):
        self.check(rng, random_ids(rng, tokens, 2, 4), experts=4, shared=shared)

    def test_one_expert_twice(self, rng):
        """A token may name an expert twice: both weights count."""
        self.check(rng, np.asarray([[3, 3, 1]]), experts=4)

    @pytest.mark.parametrize("tokens", [1, 3, 40])
    def test_parts_add_up(self, rng, tokens):
        """Experts in three places: each adds what its own do, and nothing for another's."""
        ids = random_ids(rng, tokens, 3, 9)
        ids[0] = (0, 1, 2)  # the first token has nothing elsewhere
        case = make_experts(rng, ids, experts=9, unused=self.unused)
        run = functools.partial(jitted(self.backend, self.interpret, partial=True), case.x)
        parts = []
        for first in (0, 3, 6):
            own = slice(first, first + 3)
            local = np.where((ids >= first) & (ids < first + 3), ids - first, 3)
            local = jnp.asarray(local, jnp.int32)
            parts.append(run(local, case.weights, case.gate_up[own], case.down[own]))
        assert_within(parts[0] + parts[1] + parts[2], mixture(case), BOUNDS["float32"])
        assert (np.asarray(parts[1])[0] == 0).all()

    @pytest.mark.parametrize(("dim", "inter"), [(16, 16), (64, 176), (144, 32)])
    def test_widths(self, rng, dim, inter):
        self.check(rng, random_ids(rng, 9, 2, 4), experts=4, dim=dim, inter=inter)

    def test_compiles_once(self, rng):
        """The routing is a value."""
        traces = 0

        def run(*args):
            nonlocal traces
            traces += 1
            return expert_ffn(*args, backend=self.backend, interpret=self.interpret)

        run_jitted = jax.jit(run, compiler_options=QUICK_COMPILE)
        for ids in (random_ids(rng, 20, 2, 4), np.full((20, 2), 3), random_ids(rng, 20, 2, 3)):
            case = make_experts(rng, ids, experts=4, shared=1, unused=self.unused)
            assert_within(run_jitted(*case.args), mixture(case), BOUNDS["float32"])
        assert traces == 1

    @settings(
        max_examples=20,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(seed=st.integers(0, 2**32 - 1), concentration=st.sampled_from([0.1, 1.0, 10.0]))
    def test_any_routing(self, seed, concentration):
        """One shape; loads from even to nearly all on one expert."""
        rng = np.random.default_rng(seed)
        load = rng.dirichlet(np.full(6, concentration))
        self.check(rng, rng.choice(6, (19, 2), p=load), experts=6)


class TestReference(ExpertSuite):
    # XLA may multiply every row with every expert, and select.
    backend, interpret, unused = "reference", False, 50.0

    def test_gradient(self, rng):
        """Against the gradient of a dense einsum over all experts, every argument."""
        case = make_experts(
            rng, random_ids(rng, 7, 2, 5) % 4, experts=5, shared=1, unused=self.unused
        )
        target = jnp.asarray(rng.standard_normal(case.x.shape), jnp.float32)
        einsum = functools.partial(jnp.einsum, precision="highest")

        def dense(x, weights, gate_up, down, shared):
            share = jax.nn.one_hot(case.expert_ids, 5) * weights[..., None]  # [T, A, E]
            gate, up = einsum("td,egid->gtei", x, gate_up)
            y = einsum("tei,edi->ted", jax.nn.silu(gate) * up, down)
            gate, up = einsum("td,gid->gti", x, shared[0])
            always = einsum("ti,di->td", jax.nn.silu(gate) * up, shared[1])
            return einsum("ted,tae->td", y, share) + always

        def grouped(x, *rest):
            return expert_ffn(x, case.expert_ids, *rest, backend="reference")

        args = case.x, case.weights, case.gate_up, case.down, case.shared
        want, got = (
            jax.jit(jax.grad(lambda args, f=f: (f(*args) * target).sum()))(args)
            for f in (dense, grouped)
        )
        for got_part, want_part in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            scale = np.abs(want_part).max()
            assert scale > 0
            np.testing.assert_allclose(got_part, want_part, rtol=0, atol=1e-5 * scale)
        np.testing.assert_array_equal(got[2][4], 0 * got[2][4])  # nobody's expert

    def test_widths_of_no_kernel(self, rng):
        self.check(rng, random_ids(rng, 5, 2, 3), experts=3, dim=10, inter=7)


class TestTritonInterpreted(ExpertSuite):
    # NaN: experts of no token are not read.
    backend, interpret, unused = "triton", True, np.nan


# --- errors and the choice of a backend -------------------------------------------------------


@pytest.fixture
def case(rng) -> ExpertCase:
    return make_experts(rng, random_ids(rng, 3, 2, 4), experts=4, shared=2)


BF16 = jnp.bfloat16
ERRORS = {
    "x": (ValueError, {"x": jnp.zeros((4, 32))}, "x: got shape (4, 32), expected (3, 32)"),
    "weights": (
        ValueError,
        {"weights": jnp.zeros((3, 3))},
        "weights: got shape (3, 3), expected (3, 2)",
    ),
    "down": (
        ValueError,
        {"down": jnp.zeros((4, 48, 32))},
        "down: got shape (4, 48, 32), expected (4, 32, 48)",
    ),
    "gate_up": (
        ValueError,
        {"gate_up": jnp.zeros((4, 3, 48, 32))},
        "gate_up: got shape (4, 3, 48, 32), expected (4, 2, 48, 32)",
    ),
    "shared_gate_up": (
        ValueError,
        {"shared": (jnp.zeros((2, 96, 31)), jnp.zeros((32, 96)))},
        "shared[0]: got shape (2, 96, 31), expected (2, 96, 32), wide a multiple of 48",
    ),
    "shared_down": (
        ValueError,
        {"shared": (jnp.zeros((2, 96, 32)), jnp.zeros((32, 48)))},
        "shared[1]: got shape (32, 48), expected (32, 96), wide a multiple of 48",
    ),
    "shared_wide": (
        ValueError,
        {"shared": (jnp.zeros((2, 72, 32)), jnp.zeros((32, 72)))},
        "shared[0]: got shape (2, 72, 32), expected (2, 72, 32), wide a multiple of 48",
    ),
    "shared_dtype": (
        TypeError,
        {"shared": (jnp.zeros((2, 48, 32), BF16), jnp.zeros((32, 48)))},
        "shared[0]: got dtype bfloat16, expected float32",
    ),
    "x_dtype": (
        TypeError,
        {"x": jnp.zeros((3, 32), jnp.int32)},
        "x: got dtype int32, expected one of float32, bfloat16, float16",
    ),
    "gate_up_dtype": (
        TypeError,
        {"gate_up": jnp.zeros((4, 2, 48, 32), BF16)},
        "gate_up: got dtype bfloat16, expected float32",
    ),
    "down_dtype": (
        TypeError,
        {"down": jnp.zeros((4, 32, 48), BF16)},
        "down: got dtype bfloat16, expected float32",
    ),
    "weights_dtype": (
        TypeError,
        {"weights": jnp.zeros((3, 2), BF16)},
        "weights: got dtype bfloat16, expected float32",
    ),
    "expert_ids_dtype": (
        TypeError,
        {"expert_ids": jnp.zeros((3, 2), jnp.uint8)},
        "expert_ids: got dtype uint8, expected int32",
    ),
}


@pytest.mark.parametrize(("error", "changes", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_argument(case, error, changes, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        expert_ffn(*dataclasses.replace(case, **changes).args)


@pytest.mark.parametrize("name", ["dim", "inter"])
def test_unsupported_by_triton(rng, name):
    sizes = {"dim": 32, "inter": 32} | {name: 24}
    case = make_experts(
        rng, random_ids(rng, 3, 2, 4), experts=4, dim=sizes["dim"], inter=sizes["inter"]
    )
    text = f"{name} is 24, the kernel needs a multiple of 16"
    with pytest.raises(NotImplementedError, match=f"'triton' cannot run this expert_ffn: {text}$"):
        expert_ffn(*case.args, backend="triton", interpret=True)


def test_unknown_backend(case):
    with pytest.raises(ValueError, match=r"^backend: got 'xla', expected None or one of "):
        expert_ffn(*case.args, backend="xla")


def lowered(case: ExpertCase, backend: str | None, platform: str) -> str:
    run = jax.jit(lambda *args: expert_ffn(*args, backend=backend))
    return run.trace(*case.args).lower(lowering_platforms=(platform,)).as_text()


def test_backend_none(case):
    """The reference on this machine, Triton where the device is a GPU."""
    assert lowered(case, None, "cpu") == lowered(case, "reference", "cpu")
    h200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(h200):
        by_default = lowered(case, None, "cuda")
        assert by_default == lowered(case, "triton", "cuda")
        assert "xla.gpu.triton" in by_default


# --- the plan of tiles --------------------------------------------------------------------------

jitted_plan = jax.jit(plan_row_tiles, static_argnums=(1, 2), static_argnames="partial")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(
        [(1, 4, 16), (16, 4, 16), (17, 4, 16), (17, 1, 16), (48, 3, 16), (50, 40, 16), (130, 3, 32)]
    ),
    data=st.data(),
)
def test_plan_row_tiles(shape, data):
    """Every pair lies in exactly one tile, and a tile's pairs are all of its one expert."""
    pairs, experts, rows = shape
    lowest = data.draw(st.integers(0, experts - 1))
    one = st.integers(lowest, experts - 1)
    ids = data.draw(st.lists(one, min_size=pairs, max_size=pairs))
    plan = jitted_plan(jnp.asarray(ids, jnp.int32), experts, rows)
    order, expert, first, count = (np.asarray(part) for part in plan)
    assert sorted(order) == list(range(pairs))
    assert ((count >= 0) & (count <= rows)).all()
    assert ((expert >= 0) & (expert < experts)).all()
    seen = []
    for tile in range(len(count)):
        members = order[first[tile] :][: count[tile]]
        assert len(members) == count[tile]
        assert (np.asarray(ids)[members] == expert[tile]).all()
        seen += members.tolist()
    assert sorted(seen) == list(range(pairs))


@pytest.mark.parametrize("pairs", [1, 7, 16, 17, 90])
def test_plan_of_a_part(rng, pairs):
    """Pairs of experts that are elsewhere lie in no tile: their weights would be read."""
    ids = rng.integers(0, 5, pairs)
    ids[rng.random(pairs) < 0.5] = 5
    plan = jitted_plan(jnp.asarray(ids, jnp.int32), 5, 16, partial=True)
    order, expert, first, count = (np.asarray(part) for part in plan)
    seen = []
    for tile in np.flatnonzero(count):
        members = order[first[tile] :][: count[tile]]
        assert expert[tile] < 5
        assert (ids[members] == expert[tile]).all()
        seen += members.tolist()
    assert sorted(seen) == np.flatnonzero(ids < 5).tolist()
