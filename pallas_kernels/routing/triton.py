"""Expert routing as one Pallas kernel, lowered through Triton: one token a block.

XLA makes a sort and half a dozen small kernels of it, which is what a decode step at small batch
spends its time on.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.routing.tiles import RoutingRule

NEG_INF = float("-inf")


def _take_best(values, index):
    """(largest of `values`, the lowest index that has it, `values` without it)."""
    best = jnp.max(values)
    where = jnp.min(jnp.where(values == best, index, values.shape[0]))
    return best, where, jnp.where(index == where, NEG_INF, values)


def _group_score(choice, index, rule):
    total = 0.0
    for _ in range(rule.best_of_group):
        best, _, choice = _take_best(choice, index)
        total += best
    return total


def _in_best_groups(choice, index, group, rule):
    """`choice` with -inf outside the eligible groups."""
    if rule.limited_groups == rule.groups:
        return choice
    group_index = jnp.arange(pl.next_power_of_2(rule.groups))
    scores = jnp.full(group_index.shape, NEG_INF, jnp.float32)
    for g in range(rule.groups):
        score = _group_score(jnp.where(group == g, choice, NEG_INF), index, rule)
        scores = jnp.where(group_index == g, score, scores)
    kept = jnp.full(choice.shape, NEG_INF, jnp.float32)
    for _ in range(rule.limited_groups):
        _, best, scores = _take_best(scores, group_index)
        kept = jnp.where(group == best, choice, kept)
    return kept


def _route_kernel(*refs, rule: RoutingRule, experts: int, biased: bool):
    logits_ref, *bias_refs, ids_ref, weights_ref = refs
    assert len(bias_refs) == biased
    token = pl.program_id(0)
    index = jnp.arange(pl.next_power_of_2(experts))
    real = index < experts
    logits = plgpu.load(logits_ref.at[token, index], mask=real, other=NEG_INF)
    if rule.score == "softmax":
        exponentials = jnp.exp(logits - jnp.max(logits))
        scores = exponentials / jnp.sum(exponentials)
    else:
        scores = jax.nn.sigmoid(logits)
    choice = scores
    for bias_ref in bias_refs:
        choice = choice + plgpu.load(bias_ref.at[index], mask=real, other=0)
    # NaN ranks last: an id out of range would be read by the experts.
    choice = jnp.where(real & ~jnp.isnan(choice), choice, NEG_INF)
    choice = _in_best_groups(choice, index, index // (experts // rule.groups), rule)

    slot = jnp.arange(pl.next_power_of_2(rule.active))
    ids, weights = jnp.zeros_like(slot), jnp.zeros(slot.shape, jnp.float32)
    for i in range(rule.active):
        _, best, choice = _take_best(choice, index)
        weight = jnp.sum(jnp.where(index == best, scores, 0.0))
        ids, weights = jnp.where(slot == i, best, ids), jnp.where(slot == i, weight, weights)
    if rule.normalize:
        weights = weights / (jnp.sum(weights) + 1e-20)
    used = slot < rule.active
    plgpu.store(ids_ref.at[token, slot], ids, mask=used)
    plgpu.store(weights_ref.at[token, slot], weights * rule.scale, mask=used)


def route_triton(
    logits: Float[Array, "tokens experts"],
    bias: Float[Array, " experts"] | None,
    rule: RoutingRule,
    *,
    interpret: bool,
) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"]]:
    """`route` on the Triton lowering."""
    tokens, experts = logits.shape
    operands = (logits,) if bias is None else (logits, bias)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    ids, weights = pl.pallas_call(
        lambda *refs: _route_kernel(*refs, rule=rule, experts=experts, biased=bias is not None),
        grid=(tokens,),
        in_specs=[whole] * len(operands),
        out_specs=[whole, whole],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, rule.active), jnp.int32),
            jax.ShapeDtypeStruct((tokens, rule.active), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="moe_route",
    )(*operands)
    return ids, weights
