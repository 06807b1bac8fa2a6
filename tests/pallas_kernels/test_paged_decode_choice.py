"""What `paged_decode` refuses, in which words, and which backend a call gets."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import needs_mosaic_gpu
from lowered import H200
from oracles import PagedCase, make_paged

from pallas_kernels.paged_decode import paged_decode


@pytest.fixture
def case(rng) -> PagedCase:
    return make_paged(rng, lengths=(3, 20), page_size=16, heads=4)


INT = jnp.zeros((2, 1, 4, 64), jnp.int32)
SHAPE_ERRORS = {
    "q_nope_rank": (
        {"q_nope": jnp.zeros((2, 4, 64))},
        "q_nope: got shape (2, 4, 64), expected [batch, tokens, heads, latent]",
    ),
    "ckv_rank": (
        {"ckv_cache": jnp.zeros((16, 64))},
        "ckv_cache: got shape (16, 64), expected [pages, page, latent]",
    ),
    "q_pe_heads": (
        {"q_pe": jnp.zeros((2, 1, 3, 16))},
        "q_pe: got shape (2, 1, 3, 16), expected (2, 1, 4, 16), [batch, tokens, heads, rope]",
    ),
    "latent": (
        {"ckv_cache": jnp.zeros((6, 16, 32))},
        "ckv_cache: got shape (6, 16, 32), expected a last axis of 64, q_nope's latent",
    ),
    "kpe_rope": (
        {"ckv_cache": jnp.zeros((6, 16, 64)), "kpe_cache": jnp.zeros((6, 16, 8))},
        "kpe_cache: got shape (6, 16, 8), expected (6, 16, 16), ckv_cache's pages and q_pe's rope",
    ),
    "kpe_pages": (
        {"ckv_cache": jnp.zeros((6, 16, 64)), "kpe_cache": jnp.zeros((5, 16, 16))},
        "kpe_cache: got shape (5, 16, 16), expected (6, 16, 16), ckv_cache's pages and q_pe's rope",
    ),
    "start": (
        {"start": jnp.zeros(3, jnp.int32)},
        "start: got shape (3,), expected (2,), one a request",
    ),
    "length": (
        {"length": jnp.zeros((2, 1), jnp.int32)},
        "length: got shape (2, 1), expected (2,), one a request",
    ),
    "page_ids_rank": (
        {"page_ids": jnp.zeros((2, 3), jnp.int32)},
        "page_ids: got shape (2, 3), expected a non-empty vector",
    ),
    "page_ids_empty": (
        {"page_ids": jnp.zeros(0, jnp.int32)},
        "page_ids: got shape (0,), expected a non-empty vector",
    ),
    "q_pe_rank": (
        {"q_pe": jnp.zeros((2, 4, 16))},
        "q_pe: got shape (2, 4, 16), expected [batch, tokens, heads, rope]",
    ),
    "no_request": (
        {"q_nope": jnp.zeros((0, 1, 4, 64)), "q_pe": jnp.zeros((0, 1, 4, 16))},
        "q_nope: got shape (0, 1, 4, 64), expected no empty axis",
    ),
    "no_pages": (
        {"ckv_cache": jnp.zeros((0, 16, 64)), "kpe_cache": jnp.zeros((0, 16, 16))},
        "ckv_cache: got shape (0, 16, 64), expected no empty axis",
    ),
    "too_many_tokens": (
        {"q_nope": jnp.zeros((2, 9, 4, 64)), "q_pe": jnp.zeros((2, 9, 4, 16))},
        "q_nope: got 9 query tokens, expected 1 to 8",
    ),
    "no_tokens": (
        {"q_nope": jnp.zeros((2, 0, 4, 64)), "q_pe": jnp.zeros((2, 0, 4, 16))},
        "q_nope: got shape (2, 0, 4, 64), expected no empty axis",
    ),
}
DTYPE_ERRORS = {
    "q_nope": (
        {"q_nope": INT},
        "q_nope: got dtype int32, expected one of float32, bfloat16, float16",
    ),
    "q_pe": (
        {"q_pe": jnp.zeros((2, 1, 4, 16), jnp.bfloat16)},
        "q_pe: got dtype bfloat16, expected float32, q_nope's",
    ),
    "ckv_cache": (
        {"ckv_cache": jnp.zeros((6, 16, 64), jnp.float16)},
        "ckv_cache: got dtype float16, expected float32, q_nope's, or float8_e4m3fn",
    ),
    "kpe_cache": (
        {"kpe_cache": jnp.zeros((6, 16, 16), jnp.bfloat16)},
        "kpe_cache: got dtype bfloat16, expected float32, q_nope's",
    ),
    "page_ids": (
        {"page_ids": jnp.zeros(4, jnp.int16)},
        "page_ids: got dtype int16, expected int32",
    ),
    "start": ({"start": jnp.zeros(2)}, "start: got dtype float32, expected int32"),
    "length": ({"length": jnp.zeros(2, jnp.uint32)}, "length: got dtype uint32, expected int32"),
}


def assert_refused(error: type[Exception], text: str, case: PagedCase, **options) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        paged_decode(*case.args, **{"sm_scale": 0.1, **options})


@pytest.mark.parametrize(("changes", "text"), SHAPE_ERRORS.values(), ids=SHAPE_ERRORS)
def test_bad_shape(case, changes, text):
    case = dataclasses.replace(case, ckv_cache=case.ckv_cache[:6], kpe_cache=case.kpe_cache[:6])
    assert_refused(ValueError, text, dataclasses.replace(case, **changes))


@pytest.mark.parametrize(("changes", "text"), DTYPE_ERRORS.values(), ids=DTYPE_ERRORS)
def test_bad_dtype(case, changes, text):
    case = dataclasses.replace(case, ckv_cache=case.ckv_cache[:6], kpe_cache=case.kpe_cache[:6])
    assert_refused(TypeError, text, dataclasses.replace(case, **changes))


@pytest.mark.parametrize("num_splits", [0, -2])
def test_bad_splits(case, num_splits):
    text = f"num_splits: got {num_splits}, expected None or at least 1"
    assert_refused(ValueError, text, case, num_splits=num_splits)


def test_unknown_backend(case):
    text = "backend: got 'cuda', expected None or one of mosaic_gpu, megakernel, triton, reference"
    assert_refused(ValueError, text, case, backend="cuda")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"latent": 48}, "latent is 48, the Triton lowering needs a power of two from 16"),
        ({"rope": 8}, "rope is 8, the Triton lowering needs a power of two from 16"),
        ({"latent": 1024}, "latent is 1024, a tile holds at most 512"),
    ],
    ids=str,
)
def test_unsupported_by_triton(rng, sizes, reason):
    case = make_paged(rng, lengths=(9,), heads=1, **{"page_size": 16, **sizes})
    text = f"backend 'triton' cannot run this paged_decode: {reason}"
    assert_refused(NotImplementedError, text, case, backend="triton", interpret=True)
    out, _ = paged_decode(*case.args, sm_scale=0.1)
    assert np.isfinite(out).all()


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"dtype": "float32"}, "the dtype is float32, the tensor cores take bfloat16 and float16"),
        (
            {"page_size": 1},
            "the page size is 1, the copy engine takes 8, 16, 32, or a multiple of 64",
        ),
    ],
    ids=str,
)
def test_unsupported_by_mosaic_gpu(rng, sizes, reason):
    """Nor does a named backend fall back; without a name, another one runs."""
    able = {"latent": 128, "rope": 64, "page_size": 16, "dtype": "bfloat16"}
    case = make_paged(rng, lengths=(9,), heads=1, **{**able, **sizes})
    text = f"backend 'mosaic_gpu' cannot run this paged_decode: {reason}"
    assert_refused(NotImplementedError, text, case, backend="mosaic_gpu", interpret=True)
    out, _ = paged_decode(*case.args, sm_scale=0.1)
    assert np.isfinite(out).all()


def lowered(case: PagedCase, backend: str | None, platform: str) -> str:
    def run(*args):
        return paged_decode(*args, sm_scale=0.1, backend=backend)

    return jax.jit(run).trace(*case.args).lower(lowering_platforms=(platform,)).as_text()


def test_none_is_the_reference_on_a_cpu(case):
    assert lowered(case, None, "cpu") == lowered(case, "reference", "cpu")


def test_none_is_triton_on_a_gpu(case):
    with jax.sharding.use_abstract_mesh(H200):
        by_default = lowered(case, None, "cuda")
        assert by_default == lowered(case, "triton", "cuda")
        assert by_default != lowered(case, "reference", "cuda")


def test_none_is_the_reference_where_triton_cannot(rng):
    case = make_paged(rng, lengths=(9,), page_size=8, heads=1, latent=48)
    with jax.sharding.use_abstract_mesh(H200):
        assert lowered(case, None, "cuda") == lowered(case, "reference", "cuda")


def test_a_named_backend_needs_no_gpu_to_trace(case):
    def run(*args):
        return paged_decode(*args, sm_scale=0.1, backend="triton")

    assert "pallas_call" in str(jax.jit(run).trace(*case.args).jaxpr)


def test_the_device_is_part_of_the_jit_cache(case):
    """A function traced for this machine is traced again for another device."""

    @jax.jit
    def run(*args):
        return paged_decode(*args, sm_scale=0.1)

    here = run.trace(*case.args).lower(lowering_platforms=("cuda",)).as_text()
    with jax.sharding.use_abstract_mesh(H200):
        there = run.trace(*case.args).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" not in here
    assert "xla.gpu.triton" in there
