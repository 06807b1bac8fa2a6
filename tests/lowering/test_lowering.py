"""Every kernel lowers for an H200 on a machine without a GPU, and so does the decode step.

Lowering runs the Triton front end: primitives that it lacks, sizes that are no power of two and
types that do not fit are found here. Only shapes are made, so that a big model costs nothing.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Shape
from lowered import TRITON_CALL, kernels, paged_shapes

from mla_jax import Decoder, ModelConfig, MoEConfig, PagedLatentCache, decode_step, presets
from mla_jax.config import MLAConfig
from pallas_kernels import tuning
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.paged_attention import PagedTiles
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.triton import paged_decode_triton
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.paged_prefill.triton import paged_prefill_triton
from pallas_kernels.routing import RoutingRule, route

PAGED = ["mla_paged_attention", "mla_paged_merge"]
PAGE_SIZES = [1, 16, 32, 64, 128, 256]
HEADS = [1, 2, 4, 8, 16, 32, 64, 128]


def paged_kernels(*shapes, **options) -> list[str]:
    op = paged_decode if len(shapes) == 7 else paged_prefill
    return kernels(lambda *args: op(*args, sm_scale=0.07, backend="triton", **options), *shapes)


# Decode of 1 to 8 tokens, and prefill, which has 0; a sample of the other sizes with each.
@pytest.mark.parametrize("tokens", range(9))
def test_paged(rng, tokens):
    for dtype, page_size in itertools.product(("float32", "bfloat16", "float16"), PAGE_SIZES):
        latent, rope = int(rng.choice([256, 512])), int(rng.choice([0, 32, 64]))
        heads = int(rng.choice(HEADS))
        shapes = paged_shapes(heads, page_size, tokens, dtype, latent=latent, rope=rope)
        deterministic = bool(rng.integers(2))
        # A unit of prefill is never split where its result must not depend on others.
        whole = deterministic and tokens == 0
        want = PAGED[:1] if whole else PAGED
        assert paged_kernels(*shapes, deterministic=deterministic) == want, shapes


@pytest.mark.parametrize("heads", HEADS)
def test_paged_heads(heads):
    for tokens in (0, 1):
        assert paged_kernels(*paged_shapes(heads, 64, tokens)) == PAGED


@pytest.mark.parametrize("latent", [16, 256, 512])
@pytest.mark.parametrize("rope", [0, 32, 64])
def test_paged_widths(latent, rope):
    for tokens in (0, 1):
        assert paged_kernels(*paged_shapes(16, 64, tokens, latent=latent, rope=rope)) == PAGED


@pytest.mark.parametrize("num_splits", [1, 3, 64])
def test_paged_decode_splits(num_splits):
    shapes = paged_shapes(16, 64, 1)
    assert paged_kernels(*shapes, num_splits=num_splits) == (PAGED if num_splits > 1 else PAGED[:1])


TABLES = sorted(Path(tuning.__file__).with_name("tuned").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_tuned_paged_tiles(path):
    """Each entry of a shipped table, at its own key."""
    for entry in tuning.read_table(path):
        decode = entry["op"] == "paged_decode"
        run = paged_decode_triton if decode else paged_prefill_triton
        rest = {"num_splits": None} if decode else {"max_count": 300}
        tokens = entry["rows"] // entry["heads"] if decode else 0
        call = functools.partial(
            run,
            sm_scale=jnp.float32(0.07),
            deterministic=False,
            interpret=False,
            tiles=PagedTiles(**entry["tiles"]),
            **rest,
        )
        shapes = paged_shapes(entry["heads"], entry["page_size"], tokens, entry["dtype"])
        assert kernels(call, *shapes) == PAGED, entry


def test_export():
    """The kernel's custom call is one that an export has to allow."""
    exporting = functools.partial(jax.export.export, platforms=["cuda"])
    run = jax.jit(lambda *args: paged_decode(*args, sm_scale=0.07, backend="triton"))
    shapes = paged_shapes(16, 64, 1)
    with pytest.raises(ValueError, match=r"gpu\.triton"):
        exporting(run)(*shapes)
    allowed = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    exported = exporting(run, disabled_checks=[allowed])(*shapes)
    assert TRITON_CALL.findall(exported.mlir_module()) == PAGED
    assert [aval.shape for aval in exported.out_avals] == [(4, 1, 16, 512), (4, 1, 16)]


@pytest.mark.parametrize("tokens", [1, 32, 128])
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_experts(name, tokens):
    config = presets[name]
    moe, dim = config.moe, config.mla.dim
    assert moe is not None
    rule = RoutingRule(
        active=moe.n_active,
        groups=moe.n_groups,
        limited_groups=moe.n_limited_groups,
        score=moe.score,
        normalize=moe.normalize,
        scale=moe.route_scale,
    )
    wide = moe.n_shared * moe.inter_dim

    def run(x, logits, bias, gate_up, down, shared):
        ids, weights = route(logits, bias, rule)
        return expert_ffn(x, ids, weights, gate_up, down, shared)

    shapes = (
        Shape((tokens, dim), jnp.bfloat16),
        Shape((tokens, moe.n_routed), jnp.float32),
        Shape((moe.n_routed,), jnp.float32) if moe.score == "sigmoid" else None,
        Shape((moe.n_routed, 2, moe.inter_dim, dim), jnp.bfloat16),
        Shape((moe.n_routed, dim, moe.inter_dim), jnp.bfloat16),
        (Shape((2, wide, dim), jnp.bfloat16), Shape((dim, wide), jnp.bfloat16)),
    )
    assert kernels(run, *shapes) == ["moe_route", "moe_hidden", "moe_output"]


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_step(batch):
    """V2-Lite's attention of a few rows; a dense layer and one of experts, all small."""
    config = ModelConfig(
        vocab=512,
        n_layers=2,
        inter_dim=256,
        n_dense=1,
        mla=MLAConfig(dim=256, n_heads=16),
        moe=MoEConfig(n_routed=8, n_active=2, inter_dim=128, n_shared=1),
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(
        lambda: PagedLatentCache.create(config, num_pages=4096, max_batch=batch, max_pages=64)
    )
    definition, weights = nnx.split(model)

    def step(weights, tokens, cache):
        return decode_step(nnx.merge(definition, weights), tokens, cache)

    names = kernels(step, weights, Shape((batch,), jnp.int32), cache)
    assert names.count("mla_paged_attention") == config.n_layers
    assert names[-3:] == ["moe_route", "moe_hidden", "moe_output"]
