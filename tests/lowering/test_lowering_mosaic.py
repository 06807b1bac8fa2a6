"""The Mosaic GPU kernel lowers for an H200 on a machine without a GPU, and who gets it."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx
from interpreted import MOSAIC_GPU, needs_mosaic_gpu
from jax import ShapeDtypeStruct as Shape
from lowered import A100, H200, MOSAIC_CALL, TRITON_CALL, cuda, paged_shapes

from mla_jax import Decoder, ModelConfig, PagedLatentCache, decode_step
from mla_jax.config import MLAConfig
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.mosaic_gpu import FEW_ROWS, paged_decode_mosaic

ALONE, MERGED = (1, []), (2, [])
"""The attention, and the merge behind it."""
PAGE_SIZES = (8, 16, 32, 64, 192, 256)
HEADS = (1, 3, 8, 16, 40, 64, 65, 126, 128)


def launches(text: str) -> tuple[int, list[str]]:
    """(Mosaic GPU kernels, the Triton ones by name) of a program."""
    return len(MOSAIC_CALL.findall(text)), TRITON_CALL.findall(text)


def decode(*shapes, backend: str | None = "mosaic_gpu", **options) -> tuple[int, list[str]]:
    """What a call launches."""

    def run(*args):
        return paged_decode(*args, sm_scale=0.07, backend=backend, **options)

    return launches(cuda(run, *shapes))


@needs_mosaic_gpu
class TestLowers:
    @pytest.mark.parametrize("tokens", range(1, 9))
    def test_sample(self, rng, tokens):
        """With a sample of the other sizes and options."""
        dtype = str(rng.choice(["bfloat16", "float16"]))
        heads, page_size, rope = (int(rng.choice(c)) for c in (HEADS, PAGE_SIZES, (0, 64)))
        latent = int(rng.choice([128, 256, 384, 512]))
        options = ({}, {"num_splits": 3}, {"deterministic": True})[rng.integers(3)]
        shapes = paged_shapes(heads, page_size, tokens, dtype, latent=latent, rope=rope)
        assert decode(*shapes, **options) == MERGED, (shapes, options)

    @pytest.mark.parametrize("heads", [1, 64, 65, 128])
    def test_heads(self, heads):
        assert decode(*paged_shapes(heads, 64, 1)) == MERGED

    @pytest.mark.parametrize("page_size", PAGE_SIZES)
    def test_page_sizes(self, page_size):
        """A cluster of two blocks."""
        assert decode(*paged_shapes(128, page_size, 1)) == MERGED

    @pytest.mark.parametrize(
        ("heads", "latent", "rope"),
        [(64, 128, 64), (64, 384, 0), (64, 512, 0), (128, 128, 0), (128, 256, 64), (128, 512, 0)],
    )
    def test_widths(self, heads, latent, rope):
        shapes = paged_shapes(heads, 64, 1, "float16", latent=latent, rope=rope)
        assert decode(*shapes) == MERGED

    @pytest.mark.parametrize("heads", [16, 128])
    @pytest.mark.parametrize(
        ("options", "want"),
        [
            ({"num_splits": 1}, ALONE),
            ({"num_splits": 64}, MERGED),
            ({"deterministic": True}, MERGED),
        ],
        ids=str,
    )
    def test_options(self, heads, options, want):
        assert decode(*paged_shapes(heads, 64, 1), **options) == want

    def test_batches(self):
        for batch in (1, 2000):
            assert decode(*paged_shapes(128, 64, 1, batch=batch)) == MERGED

    def test_too_much_shared_memory_does_not_lower(self):
        """So that what lowers fits: two tiles of keys of 640 and their queries do not."""

        def run(*args):
            options = {"num_splits": 1, "deterministic": False, "interpret": False}
            return paged_decode_mosaic(*args, sm_scale=jnp.float32(0.07), **options)

        with pytest.raises(ValueError, match=r"exceeds available shared memory.* > .*232448"):
            cuda(run, *paged_shapes(128, 64, 1, latent=640))

    def test_many_calls_lower_the_kernel_once(self):
        """As the layers of a model make them: the same shapes in other arrays."""

        def run(q_nope, *args):
            for _ in range(20):
                q_nope, _ = paged_decode(q_nope, *args, sm_scale=0.07, backend="mosaic_gpu")
            return q_nope

        text = cuda(run, *paged_shapes(128, 64, 1))
        assert launches(text) == MERGED
        assert text.count("call @attend_pages_mosaic") == 20
        assert text.count("call @merge_parts_mosaic") == 20

    def test_vmap_makes_one_launch(self):
        """Over queries, lengths and tables of the same pools."""
        shapes = paged_shapes(128, 64, 1)
        mapped = [0, 0, None, None, 0, 0, 0]
        stacked = [
            shape if axis is None else Shape((3, *shape.shape), shape.dtype)
            for shape, axis in zip(shapes, mapped, strict=True)
        ]

        def run(*args):
            return paged_decode(*args, sm_scale=0.07, backend="mosaic_gpu")

        assert launches(cuda(jax.vmap(run, mapped), *stacked)) == MERGED

    def test_export(self):
        """No custom call is one that an export has to allow."""
        run = jax.jit(lambda *args: paged_decode(*args, sm_scale=0.07, backend="mosaic_gpu"))
        exporting = jax.export.export(run, platforms=["cuda"])
        exported = exporting(*paged_shapes(128, 64, 1))
        assert launches(exported.mlir_module()) == MERGED
        assert [aval.shape for aval in exported.out_avals] == [(4, 1, 128, 512), (4, 1, 128)]

    def test_decode_step(self):
        """The layers of a model of 128 heads share one kernel."""
        config = ModelConfig(
            vocab=512, n_layers=3, inter_dim=256, n_dense=3, mla=MLAConfig(dim=256, n_heads=128)
        )
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        cache = jax.eval_shape(
            lambda: PagedLatentCache.create(config, num_pages=4096, max_batch=32, max_pages=64)
        )
        definition, weights = nnx.split(model)

        def step(weights, tokens, cache):
            return decode_step(nnx.merge(definition, weights), tokens, cache)

        text = cuda(step, weights, Shape((32,), jnp.int32), cache)
        assert launches(text)[0] == MERGED[0]
        assert text.count("call @attend_pages_mosaic") == config.n_layers


WITH_TRITON = (0, ["mla_paged_attention", "mla_paged_merge"])
FEW, MANY = ((1, 1), (FEW_ROWS, 1), (2, 8)), ((FEW_ROWS + 1, 1), (128, 1), (FEW_ROWS, 3))
"""Heads and query tokens."""


def test_few_rows_get_triton():
    for heads, tokens in FEW:
        assert decode(*paged_shapes(heads, 64, tokens), backend=None) == WITH_TRITON


def test_many_rows_get_mosaic_gpu_where_jax_has_it():
    want = MERGED if MOSAIC_GPU else WITH_TRITON
    for heads, tokens in MANY:
        assert decode(*paged_shapes(heads, 64, tokens), backend=None) == want


def test_what_mosaic_gpu_cannot_gets_triton():
    for shapes in (
        paged_shapes(128, 1, 1),
        paged_shapes(128, 64, 1, "float32"),
        paged_shapes(128, 64, 1, rope=32),
        paged_shapes(128, 64, 1, latent=64),
    ):
        assert decode(*shapes, backend=None) == WITH_TRITON


def test_other_gpus_get_triton():
    for heads, tokens in itertools.chain(FEW, MANY):
        with jax.sharding.use_abstract_mesh(A100):
            assert decode(*paged_shapes(heads, 64, tokens), backend=None) == WITH_TRITON


@needs_mosaic_gpu
def test_the_device_is_part_of_the_jit_cache():
    """A function traced for one GPU is traced again for another, on which it has another kernel."""
    run = jax.jit(lambda *args: paged_decode(*args, sm_scale=0.07))
    shapes = paged_shapes(128, 64, 1)
    for mesh, want in ((A100, WITH_TRITON), (H200, MERGED)) * 2:
        with jax.sharding.use_abstract_mesh(mesh):
            text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert launches(text) == want


@pytest.mark.skipif(MOSAIC_GPU, reason="this jax has Mosaic GPU")
def test_an_old_jax_says_so():
    with pytest.raises(NotImplementedError, match=rf"jax is {jax.__version__}, Mosaic GPU's"):
        decode(*paged_shapes(128, 64, 1))
