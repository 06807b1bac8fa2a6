"""`MLA`: every path through it against the layer oracle, with the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from flax import nnx
from jax.sharding import PartitionSpec
from oracles import QUICK_COMPILE

from mla_jax import MLA, MLAConfig, ModelConfig, PagedLatentCache, YarnConfig
from mla_jax.cache import AbsorbCache, NaiveCache
from mla_jax.reference import LayerWeights, mla_softmax_scale, precompute_freqs_cis, ref_layer
from mla_jax.rope import rotation

BATCH, TIME, DIM = 2, 19, 24
# Latent and rope are sizes that the Triton kernel takes.
PLAIN = MLAConfig(
    dim=DIM,
    n_heads=3,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=6,
    dtype="float32",
)
YARN = YarnConfig(factor=40.0, original_max_position=16, mscale=0.7, mscale_all_dim=0.7)
CONFIGS = {
    "direct_query": PLAIN,
    "low_rank_query": dataclasses.replace(PLAIN, q_lora_rank=10),
    "half_split_rope": dataclasses.replace(PLAIN, rope_interleave=False),
    "yarn": dataclasses.replace(PLAIN, q_lora_rank=7, yarn=YARN),
}
CUTS = {"prefill": (TIME,), "chunks": (5, 9, 5), "decode": (16, 1, 1, 1)}


@pytest.fixture(params=CONFIGS)
def mla(request, seed) -> MLA:
    return shared(request.param, seed)


@functools.cache
def shared(config: str, seed: int) -> MLA:
    """A layer that many tests read, and that none changes."""
    return build(CONFIGS[config], seed)


def build(config: MLAConfig, seed: int) -> MLA:
    return drawn(lambda: MLA(config, rngs=nnx.Rngs(0)), seed)


@pytest.fixture
def x(rng) -> jax.Array:
    return jnp.asarray(rng.standard_normal((BATCH, TIME, DIM)), jnp.float32)


def oracle(mla: MLA, x: jax.Array, attn_impl="naive"):
    """The oracle's trace. It rotates pairs: rows of halves are first laid out as pairs."""
    config = mla.config
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim

    def as_pairs(weight: jax.Array, head: int) -> jax.Array:
        """`weight` with the last `rope` rows of each `head` rows in the order of pairs."""
        if config.rope_interleave:
            return weight
        halves = jnp.arange(rope).reshape(2, -1).T.ravel()
        order = jnp.concatenate([jnp.arange(head - rope), head - rope + halves])
        return weight.reshape(-1, head, weight.shape[-1])[:, order].reshape(weight.shape)

    if config.q_lora_rank:
        queries = {
            "wq_a": mla.wq_a.weight[...],
            "q_norm": mla.q_norm.weight[...],
            "wq_b": as_pairs(mla.wq_b.weight[...], nope + rope),
        }
    else:
        queries = {"wq": as_pairs(mla.wq.weight[...], nope + rope)}
    weights = LayerWeights(
        **queries,
        wkv_a=as_pairs(mla.wkv_a.weight[...], config.kv_lora_rank + rope),
        kv_norm=mla.kv_norm.weight[...],
        wkv_b=mla.wkv_b.weight[...],
        wo=mla.wo.weight[...],
    )
    # The oracle's YaRN is on when the table is longer than the original context.
    original = config.yarn.original_max_position if config.yarn else TIME
    scale = mla_softmax_scale(nope + rope, rope_factor=40.0, mscale=0.7) if config.yarn else None
    layer = functools.partial(
        ref_layer,
        freqs_cis=precompute_freqs_cis(TIME, qk_rope_head_dim=rope, original_seq_len=original),
        n_heads=config.n_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=config.v_head_dim,
        softmax_scale=scale,
        attn_impl=attn_impl,
    )
    return layer(x, weights)


def assert_close(got: jax.Array, want: jax.Array, tolerance: float = 1e-5) -> None:
    got64, want64 = (np.asarray(array).astype(np.float64) for array in (got, want))
    np.testing.assert_allclose(got64, want64, rtol=0, atol=tolerance * np.abs(want64).max())


def compiled(mla: MLA, call):
    """call(mla, ...), compiled with the weights as arguments: constants would be folded."""
    definition, weights = nnx.split(mla)

    def run(weights, *args):
        return call(nnx.merge(definition, weights), *args)

    return functools.partial(jax.jit(run, compiler_options=QUICK_COMPILE), weights)


def in_chunks(x: jax.Array, cuts: tuple[int, ...]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(cuts)[:-1].tolist(), axis=1)


def contiguous(mla: MLA, x: jax.Array, kind: type, cuts: tuple[int, ...]):
    """(out, cache) of the chunks of `x`, one call each."""
    cache = kind.create(mla.config, batch=BATCH, max_seq_len=TIME + 3)
    step = compiled(mla, MLA.__call__)
    outs, start = [], 0
    for chunk in in_chunks(x, cuts):
        out, cache = step(chunk, cache, jnp.int32(start))
        outs.append(out)
        start += chunk.shape[1]
    return jnp.concatenate(outs, axis=1), cache


def paged(mla: MLA, x: jax.Array, cuts: tuple[int, ...], *, rng, page_size: int, **kernel):
    """The chunks of `x` through pages in random order; what no token was written to is NaN."""
    model = ModelConfig(vocab=1, n_layers=1, inter_dim=1, mla=mla.config)
    max_pages = -(-TIME // page_size)
    num_pages = BATCH * max_pages + 2
    cache = PagedLatentCache.create(
        model, num_pages=num_pages, page_size=page_size, max_batch=BATCH, max_pages=max_pages
    )
    table = rng.permutation(num_pages)[: BATCH * max_pages].reshape(BATCH, max_pages)
    cache = dataclasses.replace(
        jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache),
        block_table=jnp.asarray(table, jnp.int32),
        lengths=cache.lengths,
    )

    def chunk_step(mla, chunk, cache):
        view = cache.view(chunk.shape[1], jnp.full(BATCH, chunk.shape[1], jnp.int32))
        rope = rotation(mla.config, view.positions)
        out, ckv, kpe = mla.paged(chunk, cache.ckv[0], cache.kpe[0], view, rope, **kernel)
        return out, cache.advanced(view, (ckv,), (kpe,))

    step = compiled(mla, chunk_step)
    outs = []
    for chunk in in_chunks(x, cuts):
        out, cache = step(chunk, cache)
        outs.append(out)
    np.testing.assert_array_equal(cache.lengths, [TIME] * BATCH)
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
def test_without_a_cache(mla, x, attn_impl):
    out = compiled(mla, functools.partial(MLA.__call__, attn_impl=attn_impl))(x)
    assert_close(out, oracle(mla, x).out)


@pytest.mark.parametrize("cuts", [CUTS["chunks"], CUTS["decode"]], ids=["chunks", "decode"])
@pytest.mark.parametrize("kind", [NaiveCache, AbsorbCache])
def test_contiguous_cache(mla, x, kind, cuts):
    out, cache = contiguous(mla, x, kind, cuts)
    trace = oracle(mla, x, "naive" if kind is NaiveCache else "absorb")
    assert_close(out, trace.out)
    if mla.config.rope_interleave:  # halves lie in another order in the oracle's cache
        for got, want in zip(jax.tree.leaves(cache), trace.caches, strict=True):
            assert_close(got[:, :TIME], want)
            np.testing.assert_array_equal(got[:, TIME:], 0.0)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_paged_reference(mla, x, rng, cuts):
    out = paged(mla, x, cuts, rng=rng, page_size=4, backend="reference")
    assert_close(out, oracle(mla, x).out)


@pytest.mark.parametrize("config", ["low_rank_query", "yarn"])
def test_paged_triton(seed, x, rng, config):
    mla = build(CONFIGS[config], seed)
    out = paged(mla, x, CUTS["decode"], rng=rng, page_size=16, backend="triton", interpret=True)
    assert_close(out, oracle(mla, x).out)


def test_bfloat16(seed, x, rng):
    """Rounded at the same places or not, the paths agree to a few units in the last place."""
    mla = build(dataclasses.replace(PLAIN, q_lora_rank=10, dtype="bfloat16"), seed)
    x = x.astype(jnp.bfloat16)
    want = oracle(mla, x).out
    outs = [
        compiled(mla, MLA.__call__)(x),
        contiguous(mla, x, AbsorbCache, CUTS["prefill"])[0],
        paged(mla, x, CUTS["prefill"], rng=rng, page_size=4),
    ]
    for out in outs:
        assert out.dtype == jnp.bfloat16
        assert_close(out, want, 4e-2)


@pytest.mark.parametrize("kind", [NaiveCache, AbsorbCache])
def test_decode_in_scan(seed, x, kind):
    """start_pos may be traced: a compiled loop over single tokens."""
    mla = build(CONFIGS["low_rank_query"], seed)

    def loop(mla, x, cache):
        def step(cache, inputs):
            token, position = inputs
            out, cache = mla(token[:, None], cache, position)
            return cache, out[:, 0]

        steps = jnp.moveaxis(x, 1, 0), jnp.arange(TIME, dtype=jnp.int32)
        return jnp.moveaxis(jax.lax.scan(step, cache, steps)[1], 0, 1)

    cache = kind.create(mla.config, batch=BATCH, max_seq_len=TIME)
    out = compiled(mla, loop)(x, cache)
    assert_close(out, oracle(mla, x).out)


@pytest.mark.parametrize("attn_impl", ["naive", "absorb"])
def test_training(seed, x, rng, attn_impl):
    """Finite gradients that reach every parameter, and a loss that falls."""
    mla = build(CONFIGS["low_rank_query"], seed)
    target = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def loss(mla):
        return jnp.mean((mla(x, attn_impl=attn_impl) - target) ** 2)

    optimizer = nnx.Optimizer(mla, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(mla, optimizer):
        value, gradients = nnx.value_and_grad(loss)(mla)
        optimizer.update(mla, gradients)
        return value, gradients

    losses = []
    for _ in range(6):
        value, gradients = step(mla, optimizer)
        losses.append(float(value))
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() > 0
    assert losses == sorted(losses, reverse=True)


def test_gradients_of_both_forms_agree(seed, x):
    mla = build(CONFIGS["direct_query"], seed)

    def gradients(attn_impl):
        @nnx.jit
        def run(mla):
            return nnx.grad(lambda mla: jnp.sum(jnp.sin(mla(x, attn_impl=attn_impl))))(mla)

        return jax.tree.leaves(run(mla))

    for naive, absorb in zip(gradients("naive"), gradients("absorb"), strict=True):
        assert_close(absorb, naive, 5e-5)


@pytest.mark.parametrize("config", ["direct_query", "low_rank_query"])
def test_sharding_annotations(config):
    """Heads are the model axis: outputs of wq, wq_b and wkv_b, inputs of wo; the rest is whole."""
    abstract = nnx.eval_shape(lambda: MLA(CONFIGS[config], rngs=nnx.Rngs(0)))
    specs = {
        path[0]: spec.get_value()
        for path, spec in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(abstract)))
    }
    by_heads, whole = PartitionSpec("model", None), PartitionSpec(None, None)
    queries = {"wq": by_heads}
    if config == "low_rank_query":
        queries = {"wq_a": whole, "q_norm": PartitionSpec(None), "wq_b": by_heads}
    assert specs == {
        **queries,
        "wkv_a": whole,
        "kv_norm": PartitionSpec(None),
        "wkv_b": by_heads,
        "wo": PartitionSpec(None, "model"),
    }


class TestErrors:
    @pytest.fixture
    def layer(self, seed) -> MLA:
        return build(PLAIN, seed)

    @pytest.fixture
    def cache(self) -> AbsorbCache:
        return AbsorbCache.create(PLAIN, batch=BATCH, max_seq_len=TIME)

    def test_unknown_attn_impl(self, layer, x):
        with pytest.raises(ValueError, match=r"^attn_impl: got 'flash', expected 'naive' or 'abso"):
            layer(x, attn_impl="flash")

    def test_attn_impl_of_another_cache(self, layer, x, cache):
        text = "^attn_impl: got 'naive' with a AbsorbCache, expected NaiveCache$"
        with pytest.raises(ValueError, match=text):
            layer(x, cache, attn_impl="naive")

    def test_start_without_a_cache(self, layer, x):
        with pytest.raises(ValueError, match=r"^start_pos: got 3, expected 0 without a cache$"):
            layer(x, None, 3)

    def test_beyond_the_cache(self, layer, x, cache):
        with pytest.raises(ValueError, match=r"^x: got 19 tokens at 1, cache has room for 19$"):
            layer(x, cache, 1)
