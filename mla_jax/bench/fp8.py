"""Paged decode over float8_e4m3fn caches, beside our own and FlashMLA's over bfloat16.

The cache of both is the same tokens, rounded. A floor counts the rounded cache once, queries and
outputs, or the arithmetic, whichever takes longer at the rates measured in the same run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mla_jax.bench import paged, peers
from mla_jax.bench.paged import LATENT, ROPE, WIDTH, PagedShape
from mla_jax.bench.peers import Contender, PagedInputs, jax_contender
from mla_jax.bench.timing import alternating_seconds, rates
from mla_jax.paged import DEFAULT_SM_SCALE
from mla_jax.quantization import quantize_cache
from pallas_kernels.backend import choose
from pallas_kernels.paged_decode import BACKENDS, paged_decode

Layout = Literal["slot", "tensor"]
BYTES: dict[Layout, int] = {"slot": LATENT + 4 * LATENT // 128 + 2 * ROPE, "tensor": WIDTH}
"""What a cached token takes: 656, and 576."""
AGREEMENT = 1e-1
"""How far attention over rounded numbers may be from that over the numbers themselves."""
NAMES = ("B128-h16-s8192", "B128-h128-s8192", "B128-h16-s4096", "B128-h128-s4096")
SHAPES = {name: paged.SHAPES[name] for name in NAMES}


def find_shapes(names: Sequence[str] | None) -> list[PagedShape]:
    """The named shapes; None is all. Errors: ValueError, listing the names."""
    unknown = [name for name in names or () if name not in SHAPES]
    if unknown:
        raise ValueError(f"shapes: got {unknown[0]!r}, expected all or some of {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names or SHAPES]


def backend_for(shape: PagedShape, backend: str | None, layout: Layout = "slot") -> str:
    """The backend that a call over such a cache gets. Errors: as `paged_decode`'s."""
    problem = dataclasses.replace(paged.problem_of(shape), scaled=layout)
    return choose("paged_decode", BACKENDS, problem, backend).name


def moved(shape: PagedShape, layout: Layout) -> int:
    """Bytes that one call must read or write."""
    return sum(shape.lengths) * BYTES[layout] + 2 * shape.queries * (WIDTH + LATENT)


def ours(inputs: PagedInputs, layout: Layout, backend: str | None) -> Contender:
    """`paged_decode` over the cache in this layout; the chain makes its plan once."""
    cache = jax.jit(quantize_cache, static_argnames="layout")(inputs.ckv, inputs.kpe, layout=layout)

    def call(q_nope: Array, *rest: Array) -> Array:
        q_pe, ckv, kpe, scales, table, length = rest
        start = jnp.arange(table.shape[0], dtype=jnp.int32) * table.shape[1]
        return paged_decode(
            *(q_nope, q_pe, ckv, kpe, table.reshape(-1), start, length),
            sm_scale=DEFAULT_SM_SCALE,
            kv_scales=scales,
            backend=backend,
        )[0]

    pools = cache.ckv, cache.kpe, cache.scales
    return jax_contender(call, inputs.q_nope, inputs.q_pe, *pools, inputs.table, inputs.length)


def contenders(inputs: PagedInputs, backend: str | None) -> dict[str, Callable[[], Contender]]:
    """Over the bfloat16 cache: our own fastest, and FlashMLA's dense kernel where it can run."""
    plain = backend if backend == "reference" else None
    made: dict[str, Callable[[], Contender]] = {"bfloat16": lambda: paged.ours(inputs, plain)}
    if peers.flash_mla_lacks() is None:
        made["flash-mla"] = lambda: peers.flash_mla(inputs)
    return made


def bench_shape(
    shape: PagedShape, ceilings: dict[str, float], *, backend: str | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A row for each layout of the cache and each peer: ratio is the peer's time over ours.

    Errors: `paged_decode`'s; RuntimeError if the two outputs do not agree.
    """
    inputs = paged.make_inputs(shape, seed)
    for layout in BYTES:
        own = ours(inputs, layout, backend)
        output = own.output()
        for name, prepare in contenders(inputs, backend).items():
            peer = prepare()
            paged.check_agreement(shape.name, name, output, peer.output(), AGREEMENT)
            ours_seconds, peer_seconds = alternating_seconds([own.burst, peer.burst])
            micros, peer_micros = ours_seconds / own.calls * 1e6, peer_seconds / peer.calls * 1e6
            yield {
                "op": "paged_decode",
                "shape": shape.name,
                "dtype": "float8_e4m3fn",
                "layout": layout,
                "backend": backend_for(shape, backend, layout),
                "ours_us": micros,
                "peer": name,
                "peer_us": peer_micros,
                "ratio": peer_micros / micros,
                **rates(moved(shape, layout), shape.flops, micros, ceilings),
            }
