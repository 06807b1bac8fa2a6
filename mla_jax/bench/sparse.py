"""Token-sparse decode attention, over a bfloat16 and an fp8 cache, beside FlashMLA's fp8 kernel.

A shape's floor counts every listed token of every query once, its queries and its outputs, or the
arithmetic of scores and values, whichever takes longer at the rates measured in the same run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_jax.bench import peers
from mla_jax.bench.paged import LATENT, ROPE, WIDTH, check_agreement
from mla_jax.bench.peers import Contender, jax_contender
from mla_jax.bench.timing import alternating_seconds, rates
from mla_jax.paged import DEFAULT_SM_SCALE
from mla_jax.quantization import QuantizedLatents, quantize_cache
from mla_jax.sparse import mla_sparse_decode
from pallas_kernels.backend import choose
from pallas_kernels.paged_attention import PagedProblem
from pallas_kernels.token_sparse import BACKENDS

PAGE = 64
BYTES = {"bfloat16": 2 * WIDTH, "float8_e4m3fn": 656}
"""What a cached token takes, by the cache's dtype."""
AGREEMENT = {"bfloat16": 1e-1, "float8_e4m3fn": 1e-2}
"""How far our output may be from that of a peer that reads the fp8 cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseShape:
    """Requests of `cached` tokens, of which each query token lists `topk` in random order."""

    name: str
    batch: int
    heads: int
    topk: int
    tokens: int = 1
    cached: int = 8192

    @property
    def queries(self) -> int:
        return self.batch * self.tokens

    @property
    def flops(self) -> int:
        return 2 * self.queries * self.heads * self.topk * (WIDTH + LATENT)

    def moved(self, dtype: str) -> int:
        """Bytes that one call must read or write."""
        per_query = self.topk * BYTES[dtype] + self.heads * (WIDTH + LATENT) * 2
        return self.queries * per_query


SHAPES = {
    shape.name: shape
    for shape in (
        SparseShape(name="B128-h128-k2048", batch=128, heads=128, topk=2048),
        SparseShape(name="B128-h128-k2048-q2", batch=128, heads=128, topk=2048, tokens=2),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseInputs:
    """What every contender gets: the fp8 cache holds the same tokens as the other."""

    q_nope: Float[Array, "batch tokens heads latent"]
    q_pe: Float[Array, "batch tokens heads rope"]
    indices: Int[Array, "batch tokens topk"]
    ckv: Float[Array, "pages page latent"]
    kpe: Float[Array, "pages page rope"]
    fp8: QuantizedLatents


def find_shapes(names: Sequence[str] | None) -> list[SparseShape]:
    """The named shapes; None is all. Errors: ValueError, listing the names."""
    unknown = [name for name in names or () if name not in SHAPES]
    if unknown:
        expected = ", ".join(SHAPES)
        raise ValueError(f"shapes: got {unknown[0]!r}, expected all or some of {expected}")
    return [SHAPES[name] for name in names or SHAPES]


def backend_for(shape: SparseShape, backend: str | None) -> str:
    """The backend that a call of this shape gets. Errors: as `mla_sparse_decode`'s."""
    problem = PagedProblem(
        op="token_sparse",
        batch=shape.queries,
        tokens=0,
        heads=shape.heads,
        latent=LATENT,
        rope=ROPE,
        page_size=PAGE,
        dtype="bfloat16",
        num_ids=shape.queries * shape.topk,
    )
    return choose("token_sparse", BACKENDS, problem, backend).name


def make_inputs(shape: SparseShape, seed: int = 0) -> SparseInputs:
    """Normal random queries and tokens; a request's tokens lie in pages of random order."""
    keys = jax.random.split(jax.random.key(seed), 4)
    rng = np.random.default_rng(seed)
    pages = -(-shape.cached // PAGE)
    table = rng.permutation(shape.batch * pages).reshape(shape.batch, pages)
    listed = [
        [rng.permutation(shape.cached)[: shape.topk] for _ in range(shape.tokens)]
        for _ in range(shape.batch)
    ]
    position = np.asarray(listed)
    page = table[np.arange(shape.batch)[:, None, None], position // PAGE]
    leading = shape.batch, shape.tokens, shape.heads
    ckv, kpe = (
        jax.random.normal(key, (shape.batch * pages, PAGE, width), jnp.bfloat16)
        for key, width in zip(keys[2:], (LATENT, ROPE), strict=True)
    )
    return SparseInputs(
        q_nope=jax.random.normal(keys[0], (*leading, LATENT), jnp.bfloat16),
        q_pe=jax.random.normal(keys[1], (*leading, ROPE), jnp.bfloat16),
        indices=jnp.asarray(page * PAGE + position % PAGE, jnp.int32),
        ckv=ckv,
        kpe=kpe,
        fp8=jax.jit(quantize_cache)(ckv, kpe),
    )


def ours(inputs: SparseInputs, dtype: str, backend: str | None) -> Contender:
    """`mla_sparse_decode` over the cache of this dtype; the chain makes its plan once."""
    fp8 = dtype != "bfloat16"
    cache = (inputs.fp8.ckv, inputs.fp8.kpe) if fp8 else (inputs.ckv, inputs.kpe)
    scales = inputs.fp8.scales if fp8 else None

    def call(q_nope, q_pe, ckv, kpe, indices, scales):
        return mla_sparse_decode(
            *(q_nope, q_pe, ckv, kpe, indices),
            DEFAULT_SM_SCALE,
            kv_scales=scales,
            backend=backend,
        )[0]

    return jax_contender(call, inputs.q_nope, inputs.q_pe, *cache, inputs.indices, scales)


def contenders(inputs: SparseInputs, dtype: str) -> dict[str, Callable[[], Contender]]:
    """The peers that can run here: FlashMLA's, and our own in plain JAX, over the same cache."""
    made: dict[str, Callable[[], Contender]] = {}
    if peers.flash_mla_lacks() is None:
        made["flash-mla"] = lambda: peers.flash_mla_sparse(
            inputs.q_nope, inputs.q_pe, inputs.fp8.packed(), inputs.indices
        )
    return made | {"reference": lambda: ours(inputs, dtype, "reference")}


def bench_shape(
    shape: SparseShape, ceilings: dict[str, float], *, backend: str | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A row for each dtype of our cache and each peer: ratio is the peer's time over ours.

    FlashMLA's cache is fp8 in both. Errors: `mla_sparse_decode`'s; RuntimeError if the two outputs
    do not agree.
    """
    inputs = make_inputs(shape, seed)
    for dtype in BYTES:
        own = ours(inputs, dtype, backend)
        output = own.output()
        for name, prepare in contenders(inputs, dtype).items():
            peer = prepare()
            check_agreement(shape.name, name, output, peer.output(), AGREEMENT[dtype])
            seconds = alternating_seconds([own.burst, peer.burst])
            micros, peer_micros = (
                1e6 * second / contender.calls
                for second, contender in zip(seconds, (own, peer), strict=True)
            )
            yield {
                "op": "token_sparse",
                "shape": shape.name,
                "dtype": dtype,
                "backend": backend_for(shape, backend),
                "ours_us": micros,
                "peer": name,
                "peer_us": peer_micros,
                "ratio": peer_micros / micros,
                **rates(shape.moved(dtype), shape.flops, micros, ceilings),
            }
