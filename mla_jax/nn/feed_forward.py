"""Dense and mixture-of-experts feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.config import MoEConfig
from mla_jax.nn.linear import Linear, Weight, einsum, normal_param, product
from mla_jax.sharding.collectives import part_index, parts, sum_over_model
from mla_jax.sharding.mesh import MODEL_AXIS
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.routing import RoutingRule, route


class FeedForward(nnx.Module):
    """down(silu(gate x) * (up x)); gate and up lie in one array, [2, inter, dim]."""

    def __init__(self, dim: int, inter_dim: int, dtype: str, *, rngs: nnx.Rngs) -> None:
        shards = (None, MODEL_AXIS, None)
        self.gate_up = normal_param((2, inter_dim, dim), dtype, rngs, shards, Weight)
        self.down = Linear(inter_dim, dim, dtype, rngs=rngs, shards=(None, MODEL_AXIS))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return sum_over_model(self.partial(x))

    def partial(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """What the hidden features of this device add to the result."""
        gate, up = jnp.moveaxis(product(x, self.gate_up[...]), -2, 0)
        return self.down(jax.nn.silu(gate) * up)


class CorrectionBias(nnx.Variable):
    """The router's load-balancing bias: set by training, but not by its gradients."""


class Router(nnx.Module):
    """Which experts a token goes to, and with what weights; all in float32.

    Source: DeepSeek-V2 (softmax, arXiv:2405.04434), DeepSeek-V3 (sigmoid, arXiv:2412.19437).
    """

    def __init__(self, config: MoEConfig, dim: int, dtype: str, *, rngs: nnx.Rngs) -> None:
        self.rule = RoutingRule(
            active=config.n_active,
            groups=config.n_groups,
            limited_groups=config.n_limited_groups,
            score=config.score,
            normalize=config.normalize,
            scale=config.route_scale,
        )
        self.weight = normal_param((config.n_routed, dim), dtype, rngs, (None, None))
        if config.score == "sigmoid":
            self.bias = CorrectionBias(jnp.zeros(config.n_routed, jnp.float32))

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        *,
        backend: str | None = None,
        interpret: bool = False,
    ) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"]]:
        """(expert ids int32, weights float32)."""
        logits = einsum("td,ed->te", x.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        bias = self.bias[...] if self.rule.score == "sigmoid" else None
        return route(logits, bias, self.rule, backend=backend, interpret=interpret)


class MoE(nnx.Module):
    """Routed experts, and shared ones that every token passes through."""

    def __init__(self, config: MoEConfig, dim: int, dtype: str, *, rngs: nnx.Rngs) -> None:
        experts, inter = config.n_routed, config.inter_dim
        by_expert = (MODEL_AXIS, None, None)
        self.router = Router(config, dim, dtype, rngs=rngs)
        gate_up, down = (experts, 2, inter, dim), (experts, dim, inter)
        self.gate_up = normal_param(gate_up, dtype, rngs, (*by_expert, None), Weight)
        self.down = normal_param(down, dtype, rngs, by_expert, Weight)
        self.shared = (
            FeedForward(dim, config.n_shared * inter, dtype, rngs=rngs) if config.n_shared else None
        )

    def __call__(
        self,
        x: Float[Array, "*batch dim"],
        *,
        backend: str | None = None,
        interpret: bool = False,
    ) -> Float[Array, "*batch dim"]:
        rows = x.reshape(-1, x.shape[-1])
        ids, weights = self.router(rows, backend=backend, interpret=interpret)
        experts = (self.gate_up[...], self.down[...])
        kernel = {"backend": backend, "interpret": interpret}
        if parts(MODEL_AXIS) == 1:
            shared = self.shared and (self.shared.gate_up[...], self.shared.down.weight[...])
            out = expert_ffn(rows, ids, weights, *experts, shared, **kernel)
        else:
            out = expert_ffn(rows, self._own(ids), weights, *experts, partial=True, **kernel)
            if self.shared is not None:
                out = out + self.shared.partial(rows)
            out = sum_over_model(out)
        return out.reshape(x.shape)

    def _own(self, ids: Int[Array, "tokens active"]) -> Int[Array, "tokens active"]:
        """Ids among this device's experts; another device's become the number of these."""
        experts = self.gate_up.shape[0]
        local = ids - part_index(MODEL_AXIS) * experts
        return jnp.where((local >= 0) & (local < experts), local, experts)
