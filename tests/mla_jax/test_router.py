"""`Router`, `FeedForward` and `MoE` against NumPy: one token, one expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import nnx
from oracles import QUICK_COMPILE, float64, gated, routing

from mla_jax import MoEConfig
from mla_jax.nn.feed_forward import CorrectionBias, FeedForward, MoE, Router

DIM, TOKENS = 16, 9
CONFIGS = {
    "v2_lite": MoEConfig(n_routed=16, n_active=6, inter_dim=32, n_shared=2),
    "v2": MoEConfig(
        n_routed=24,
        n_active=4,
        inter_dim=16,
        n_shared=1,
        n_groups=6,
        n_limited_groups=2,
        route_scale=16.0,
    ),
    "v3": MoEConfig(
        n_routed=16,
        n_active=3,
        inter_dim=16,
        n_shared=1,
        n_groups=4,
        n_limited_groups=2,
        score="sigmoid",
        normalize=True,
        route_scale=2.5,
    ),
    "sigmoid_one_group": MoEConfig(n_routed=6, n_active=2, inter_dim=16, score="sigmoid"),
    "softmax_normalized": MoEConfig(n_routed=5, n_active=5, inter_dim=16, normalize=True),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> MoEConfig:
    return CONFIGS[request.param]


@pytest.fixture
def x(rng) -> jax.Array:
    return jnp.asarray(rng.standard_normal((TOKENS, DIM)), jnp.float32)


def run(module: nnx.Module, x: jax.Array, **options):
    """module(x), compiled with the weights as arguments: constants would be folded, slowly."""
    definition, weights = nnx.split(module)

    def call(weights, x):
        return nnx.merge(definition, weights)(x, **options)

    return jax.jit(call, compiler_options=QUICK_COMPILE)(weights, x)


def draw(module, *args, seed: int):
    return drawn(lambda: module(*args, rngs=nnx.Rngs(0)), seed)


def expected_routing(router: Router, config: MoEConfig, x: jax.Array):
    return routing(
        float64(x) @ float64(router.weight[...]).T,
        float64(router.bias[...]) if config.score == "sigmoid" else None,
        active=config.n_active,
        groups=config.n_groups,
        limited_groups=config.n_limited_groups,
        score=config.score,
        normalize=config.normalize,
        scale=config.route_scale,
    )


def expected_mixture(moe: MoE, config: MoEConfig, x: jax.Array) -> np.ndarray:
    gate_up, down = float64(moe.gate_up[...]), float64(moe.down[...])
    out = np.zeros(x.shape)
    for token, (ids, weights) in enumerate(
        zip(*expected_routing(moe.router, config, x), strict=True)
    ):
        row = float64(x)[token]
        for expert, weight in zip(ids, weights, strict=True):
            out[token] += weight * gated(row, gate_up[expert], down[expert])
        if moe.shared is not None:
            shared = moe.shared.gate_up[...], moe.shared.down.weight[...]
            out[token] += gated(row, *map(float64, shared))
    return out


def assert_close(got, want: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(float64(got), want, rtol=0, atol=tolerance * np.abs(want).max())


class TestRouter:
    def test_against_numpy(self, config, x, seed):
        router = draw(Router, config, DIM, "float32", seed=seed)
        ids, weights = run(router, x)
        want_ids, want_weights = expected_routing(router, config, x)
        assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
        np.testing.assert_array_equal(ids, want_ids)
        assert_close(weights, want_weights)

    def test_float32_in_a_bfloat16_model(self, config, x, seed):
        """Scores of bfloat16 would choose other experts; the products are float32's."""
        router = draw(Router, config, DIM, "bfloat16", seed=seed)
        rounded = x.astype(jnp.bfloat16)
        assert router.weight[...].dtype == jnp.bfloat16
        ids, weights = run(router, rounded)
        want_ids, want_weights = expected_routing(router, config, rounded)
        np.testing.assert_array_equal(ids, want_ids)
        assert_close(weights, want_weights)

    def test_the_bias_chooses_but_does_not_weigh(self, x, seed):
        """V3: an expert with a huge bias is always chosen, with its own score as weight."""
        config = MoEConfig(n_routed=6, n_active=2, inter_dim=1, score="sigmoid")
        router = draw(Router, config, DIM, "float32", seed=seed)
        router.bias[...] = jnp.zeros(6).at[4].set(100.0)
        ids, weights = run(router, x)
        np.testing.assert_array_equal(ids[:, 0], 4)
        logits = float64(x) @ float64(router.weight[...]).T
        assert_close(weights[:, 0], 1 / (1 + np.exp(-logits[:, 4])))

    def test_the_bias_is_no_parameter(self, seed):
        """Gradients and optimizers see parameters only."""
        router = draw(Router, CONFIGS["v3"], DIM, "float32", seed=seed)
        biases = nnx.state(router, CorrectionBias)
        assert list(biases) == ["bias"]
        assert list(nnx.state(router, nnx.Param)) == ["weight"]
        assert not hasattr(draw(Router, CONFIGS["v2"], DIM, "float32", seed=seed), "bias")


class TestFeedForward:
    @pytest.mark.parametrize("shape", [(DIM,), (TOKENS, DIM), (2, 3, DIM)])
    def test_against_numpy(self, rng, seed, shape):
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        layer = draw(FeedForward, DIM, 24, "float32", seed=seed)
        gate_up, down = float64(layer.gate_up[...]), float64(layer.down.weight[...])
        rows = [gated(row, gate_up, down) for row in float64(x).reshape(-1, DIM)]
        assert_close(run(layer, x), np.reshape(rows, shape))


class TestMoE:
    def test_against_numpy(self, config, x, seed):
        moe = draw(MoE, config, DIM, "float32", seed=seed)
        assert_close(run(moe, x), expected_mixture(moe, config, x))

    @pytest.mark.parametrize("name", ["v2", "v3"])
    def test_triton(self, name, x, seed):
        config = CONFIGS[name]
        moe = draw(MoE, config, DIM, "float32", seed=seed)
        out = run(moe, x, backend="triton", interpret=True)
        assert_close(out, expected_mixture(moe, config, x))

    def test_batch_axes(self, x, seed):
        moe = draw(MoE, CONFIGS["v2"], DIM, "float32", seed=seed)
        out = run(moe, x.reshape(3, 3, DIM))
        assert_close(out.reshape(x.shape), float64(run(moe, x)), 1e-6)

    def test_bfloat16(self, x, seed):
        config = CONFIGS["v3"]
        moe = draw(MoE, config, DIM, "bfloat16", seed=seed)
        rounded = x.astype(jnp.bfloat16)
        out = run(moe, rounded)
        assert out.dtype == jnp.bfloat16
        assert_close(out, expected_mixture(moe, config, rounded), 2e-2)

    @pytest.mark.parametrize("name", ["v2", "v3"])
    def test_gradients(self, name, x, rng, seed):
        """Finite, reaching the router, every expert that was chosen, and the shared ones."""
        config = CONFIGS[name]
        moe = draw(MoE, config, DIM, "float32", seed=seed)
        target = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

        @nnx.jit
        def gradients(moe):
            return nnx.grad(lambda moe: jnp.mean((moe(x) - target) ** 2))(moe)

        state = gradients(moe)
        for gradient in jax.tree.leaves(state):
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() > 0
        chosen = np.unique(run(moe.router, x)[0])
        reached = np.flatnonzero(np.abs(state["down"][...]).max(axis=(1, 2)))
        np.testing.assert_array_equal(reached, chosen)

    def test_experts_are_sharded(self):
        abstract = nnx.eval_shape(lambda: MoE(CONFIGS["v3"], DIM, "float32", rngs=nnx.Rngs(0)))
        for parameter in (abstract.gate_up, abstract.down):
            assert parameter.get_metadata()["out_sharding"][0] == "model"
        assert abstract.router.weight.get_metadata()["out_sharding"] == (None, None)
