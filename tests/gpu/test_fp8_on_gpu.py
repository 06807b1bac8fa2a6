"""float8_e4m3fn on the chip: paged decode, pools beyond 2 GiB, and experts' weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_pages import KINDS, make_fp8
from fp8_weights import assert_rows_near
from on_gpu import needs_gpu
from oracles import assert_within, float64, softmax_sum
from test_expert_ffn_fp8 import make, mixture

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.mosaic_gpu import TWINS_ROWS

pytestmark = needs_gpu

SM_SCALE = 0.03
BOUNDS = {
    "float32": {0.99: 1e-5, 1.0: 1e-4},
    "bfloat16": {0.99: 8e-3, 1.0: 3e-2},
    "float16": {0.99: 1e-3, 1.0: 4e-3},
}
LSE = {1.0: 1e-3}


BACKENDS = [
    *(("triton", dtype) for dtype in BOUNDS),
    *(("mosaic_gpu", dtype) for dtype in ("bfloat16", "float16")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("heads", "tokens"), [(1, 1), (16, 1), (7, 4), (16, 4), (128, 1), (128, 2)]
)
def test_decode(rng, heads, tokens, backend, dtype, kind):
    for page_size in (1, 16, 64, 256):
        lengths = (0, 1, page_size, page_size + 1, 777, 3000)
        sizes = {"heads": heads, "tokens": tokens, "latent": 512, "rope": 64, "dtype": dtype}
        fp8 = make_fp8(rng, kind, lengths=lengths, page_size=page_size, **sizes)

        def run(scales, *args):
            return paged_decode(*args, sm_scale=SM_SCALE, kv_scales=scales, backend=backend)

        out, lse = jax.jit(run)(fp8.kv_scales, *fp8.case.args)
        rounded = backend == "mosaic_gpu" and (page_size == 1 or heads * tokens > TWINS_ROWS)
        want_out, want_lse = fp8.want(SM_SCALE, rounded=rounded)
        assert_within(out, want_out, BOUNDS[dtype])
        assert_within(lse, want_lse, LSE)


@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("gibibytes", [3, 5])
@pytest.mark.parametrize("kind", ["slot", "tensor"])
def test_pools_beyond_2_gib(rng, gibibytes, kind, backend):
    """Offsets of more than 31 bits, and of more than 32: pages at both ends and around 2 GiB."""
    page_size, latent, rope, heads = 64, 512, 64, 16
    page_bytes = page_size * latent
    num_pages = gibibytes * 2**30 // page_bytes
    middle = 2**31 // page_bytes
    pages = [num_pages - 1, 0, middle - 1, middle, middle + 1, num_pages - 2]
    length = len(pages) * page_size - 5

    numbers = rng.standard_normal((len(pages), page_size, latent + rope)).astype(np.float32)
    ckv = jnp.asarray(numbers[..., :latent]).astype(jnp.float8_e4m3fn)
    kpe = jnp.asarray(numbers[..., latent:]).astype(jnp.bfloat16)
    # Elsewhere every number is 448 (code 0x7e), which a wrong address would show.
    place = jax.jit(lambda pool, rows: pool.at[jnp.asarray(pages)].set(rows), donate_argnums=0)
    full = jax.jit(lambda: jnp.full((num_pages, page_size, latent), 448.0, jnp.float8_e4m3fn))
    pool = place(full(), ckv)
    kpe_pool = place(jnp.ones((num_pages, page_size, rope), jnp.bfloat16), kpe)
    assert pool.nbytes > 2**31
    if kind == "slot":
        drawn = rng.uniform(0.3, 1.0, (len(pages), page_size, 4)).astype(np.float32)
        scales = place(jnp.ones((num_pages, page_size, 4), jnp.float32), jnp.asarray(drawn))
        factors = np.repeat(float64(drawn), 128, axis=-1)
    else:
        scales = jnp.float32(0.5)
        factors = 0.5
    q_nope = jnp.asarray(rng.standard_normal((1, 1, heads, latent)), jnp.bfloat16)
    q_pe = jnp.asarray(rng.standard_normal((1, 1, heads, rope)), jnp.bfloat16)
    out, lse = paged_decode(
        *(q_nope, q_pe, pool, kpe_pool, jnp.asarray(pages, jnp.int32)),
        *(jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)),
        sm_scale=SM_SCALE,
        kv_scales=scales,
        backend=backend,
    )
    keys = (float64(ckv) * factors).reshape(-1, latent)[:length]
    turned = float64(kpe).reshape(-1, rope)[:length]
    scores = float64(q_nope)[0, 0] @ keys.T + float64(q_pe)[0, 0] @ turned.T
    want_out, want_lse = softmax_sum(scores * SM_SCALE, keys)
    assert_within(out[0, 0], want_out, BOUNDS["bfloat16"])
    assert_within(lse[0, 0], want_lse, LSE)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("tokens", [4, 40, 300])
def test_experts(rng, tokens, backend):
    case = make(rng, tokens=tokens, active=3, experts=8, shared=1, dim=512, inter=256)
    out = jax.jit(lambda *args: expert_ffn(*args, backend=backend))(*case.args)
    assert_rows_near(out, mixture(case), share=0.5)
