"""`route`: one suite for every backend, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import QUICK_COMPILE, assert_within, routing

from pallas_kernels.routing import RoutingRule, route

RULES = {
    "v2_lite": (64, {"active": 6}),
    "v2": (160, {"active": 6, "groups": 8, "limited_groups": 3, "scale": 16.0}),
    "v3": (
        256,
        {
            "active": 8,
            "groups": 8,
            "limited_groups": 4,
            "score": "sigmoid",
            "normalize": True,
            "scale": 2.5,
        },
    ),
    "softmax_normalized": (6, {"active": 3, "normalize": True}),
    "sigmoid_one_group": (5, {"active": 1, "score": "sigmoid"}),
    "three_groups": (12, {"active": 4, "groups": 3, "limited_groups": 2, "score": "sigmoid"}),
    "all": (4, {"active": 4}),
}


@functools.cache
def jitted(backend: str, interpret: bool, rule: RoutingRule):
    def run(logits, bias):
        return route(logits, bias, rule, backend=backend, interpret=interpret)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


class RoutingSuite:
    """What every backend does; a subclass names one."""

    backend: str
    interpret: bool

    def check(self, logits: np.ndarray, bias: np.ndarray | None, rule: dict) -> None:
        bias32 = None if bias is None else jnp.asarray(bias, jnp.float32)
        logits32 = jnp.asarray(logits, jnp.float32)
        run = jitted(self.backend, self.interpret, RoutingRule(**rule))
        ids, weights = run(logits32, bias32)
        want_ids, want_weights = routing(logits32, bias32, **rule)
        assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
        np.testing.assert_array_equal(ids, want_ids)
        assert_within(weights, want_weights, {1.0: 1e-6 * rule.get("scale", 1.0)})

    @pytest.mark.parametrize(("experts", "rule"), RULES.values(), ids=RULES)
    @pytest.mark.parametrize("tokens", [1, 9])
    def test_rules(self, rng, experts, rule, tokens):
        bias = rng.standard_normal(experts) * 0.3 if rule.get("score") == "sigmoid" else None
        self.check(rng.standard_normal((tokens, experts)) * 2, bias, rule)

    @settings(
        max_examples=30,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(name=st.sampled_from(["v2", "v3", "three_groups"]), seed=st.integers(0, 2**32 - 1))
    def test_any_logits(self, name, seed):
        rng = np.random.default_rng(seed)
        experts, rule = RULES[name]
        bias = rng.uniform(-2, 2, experts) if rule.get("score") == "sigmoid" else None
        self.check(rng.standard_normal((3, experts)) * rng.uniform(0.1, 5), bias, rule)

    @pytest.mark.parametrize("name", ["v2_lite", "v2", "v3", "three_groups"])
    def test_ties_go_to_the_lower_id(self, rng, name):
        """Logits of three values only: experts and whole groups tie."""
        experts, rule = RULES[name]
        self.check(rng.integers(-1, 2, (5, experts)), None, rule)

    @pytest.mark.parametrize("name", ["v3", "three_groups"])
    def test_bias_below_every_score(self, rng, name):
        """Biased scores below zero: what is not eligible must rank below them all the same."""
        experts, rule = RULES[name]
        self.check(rng.standard_normal((4, experts)), rng.uniform(-9, -5, experts), rule)

    def test_extreme_logits(self):
        self.check(np.asarray([[3e4, -3e4, 0.0, 2.9e4]]), None, {"active": 2})

    @pytest.mark.parametrize("name", ["v2_lite", "v3"])
    def test_nan(self, rng, name):
        """One token's NaN stays its own, and its ids are still ids: experts are read by them."""
        experts, rule = RULES[name]
        logits = rng.standard_normal((3, experts)).astype(np.float32)
        run = jitted(self.backend, self.interpret, RoutingRule(**rule))
        want_ids, want_weights = run(logits, None)
        logits[1] = np.nan
        ids, weights = run(logits, None)
        np.testing.assert_array_equal(ids[::2], want_ids[::2])
        np.testing.assert_array_equal(weights[::2], want_weights[::2])
        assert ((ids >= 0) & (ids < experts)).all()
        assert np.isnan(weights[1]).all()


class TestReference(RoutingSuite):
    backend, interpret = "reference", False

    def test_gradient(self, rng):
        """Through the weights of the chosen experts, against the formula with the ids fixed."""
        logits = jnp.asarray(rng.standard_normal((3, 6)), jnp.float32)
        target = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
        rule = RoutingRule(active=2, normalize=True, scale=2.0)
        ids, _ = route(logits, None, rule, backend="reference")

        def by_formula(logits):
            chosen = jnp.exp(jnp.stack([row[of] for row, of in zip(logits, ids, strict=True)]))
            return (chosen / chosen.sum(axis=1, keepdims=True) * 2.0 * target).sum()

        def by_route(logits):
            return (route(logits, None, rule, backend="reference")[1] * target).sum()

        got, want = (jax.jit(jax.grad(loss))(logits) for loss in (by_route, by_formula))
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, atol=1e-6)


class TestTritonInterpreted(RoutingSuite):
    backend, interpret = "triton", True


LOGITS = jnp.zeros((2, 6))


def test_bad_bias():
    with pytest.raises(ValueError, match=r"^bias: got shape \(5,\), expected \(6,\)$"):
        route(LOGITS, jnp.zeros(5), RoutingRule(active=1))


def test_bad_groups():
    text = "^rule: got 4 groups, expected a divisor of 6 experts$"
    with pytest.raises(ValueError, match=text):
        route(LOGITS, None, RoutingRule(active=1, groups=4))


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^logits: got dtype bfloat16, expected float32$"):
        route(LOGITS.astype(jnp.bfloat16), None, RoutingRule(active=1))
    with pytest.raises(TypeError, match=r"^bias: got dtype float16, expected float32$"):
        route(LOGITS, jnp.zeros(6, jnp.float16), RoutingRule(active=1))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"^backend: got 'cuda', expected None or one of "):
        route(LOGITS, None, RoutingRule(active=1), backend="cuda")
