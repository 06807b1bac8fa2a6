"""Paged decode attention beside its peers: every shape's time, ratio and distance to its floor.

A shape's floor is the time of what it must move, or of what it must compute, whichever is longer,
at the bandwidth and the matmul rate measured in the same run. It must read each cached token once
(latent and rope) and each query, and write each output; a score and a value product a head, query
token and cached token are its arithmetic, the few keys that causality hides included.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mla_jax.bench.peers import Contender, PagedInputs, Peer, jax_contender
from mla_jax.bench.timing import CALLS, alternating_seconds, burst_of, chained, rates, seconds_a_run
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels.backend import choose
from pallas_kernels.device import current_device
from pallas_kernels.paged_attention import PagedProblem, Units, choose_tiles, pack
from pallas_kernels.paged_decode import BACKENDS, paged_decode
from pallas_kernels.paged_decode.mosaic_gpu import default_mosaic_tiles, plan_work
from pallas_kernels.paged_decode.triton import plan_splits

Row = dict[str, Any]
Programs = dict[str, tuple[Callable[..., Array], Callable[..., Array]]]
DTYPE = "bfloat16"
LATENT, ROPE = 512, 64
WIDTH = LATENT + ROPE
PEERS_PAGE = 64
"""The one page size that every peer knows; another one is compared with ours at this one."""
AGREEMENT = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedShape:
    """A batch: each request's cached tokens, and the heads and last query tokens of all."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    tokens: int = 1
    page_size: int = PEERS_PAGE

    @property
    def pages(self) -> list[int]:
        """Pages of each request."""
        return [-(-length // self.page_size) for length in self.lengths]

    @property
    def queries(self) -> int:
        return len(self.lengths) * self.tokens * self.heads

    @property
    def moved(self) -> int:
        """Bytes that one call must read or write."""
        itemsize = jnp.dtype(DTYPE).itemsize
        return itemsize * (sum(self.lengths) * WIDTH + self.queries * (WIDTH + LATENT))

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.heads * sum(self.lengths) * (WIDTH + LATENT)

    def floor(self, ceilings: dict[str, float]) -> float:
        """Microseconds."""
        moving = self.moved / ceilings["bandwidth_gb_s"] / 1e3
        return max(moving, self.flops / ceilings["matmul_tflop_s"] / 1e6)


def _even(
    batch: int, heads: int, length: int, tokens: int = 1, page_size: int = PEERS_PAGE
) -> PagedShape:
    name = f"B{batch}-h{heads}-s{length}"
    name += f"-q{tokens}" if tokens > 1 else ""
    name += f"-p{page_size}" if page_size != PEERS_PAGE else ""
    return PagedShape(
        name=name, lengths=(length,) * batch, heads=heads, tokens=tokens, page_size=page_size
    )


def _normal(heads: int) -> PagedShape:
    lengths = np.random.default_rng(0).normal(4096, 2048, 128).round().clip(1, 8192)
    return PagedShape(name=f"normal128-h{heads}", lengths=tuple(map(int, lengths)), heads=heads)


SHAPES = {
    shape.name: shape
    for shape in (
        *(_even(128, heads, 4096) for heads in (8, 16, 32, 64, 128)),
        _even(128, 16, 8192),
        _even(128, 128, 8192),
        _even(128, 128, 16384),
        _even(128, 128, 4096, tokens=2),
        _even(64, 128, 1024),
        _even(256, 16, 1024),
        *(_even(1, 16, length) for length in (1024, 4096, 65536)),
        _even(32, 16, 2048),
        _even(32, 16, 2048, tokens=4),
        _even(1, 128, 8192),
        _even(8, 128, 4096),
        _even(132, 16, 4096, tokens=4),
        PagedShape(name="long4-h16-q4", lengths=(4641, 45118, 1730, 1696), heads=16, tokens=4),
        PagedShape(
            name="ragged64-h16-q4",
            lengths=tuple(256 + 12 * i for i in range(64)),
            heads=16,
            tokens=4,
        ),
        _normal(16),
        _normal(128),
        _even(128, 16, 4096, page_size=1),
        _even(128, 16, 4096, page_size=16),
    )
}


def find_shapes(names: Sequence[str] | None) -> list[PagedShape]:
    """The named shapes; None is all. Errors: ValueError, listing the names."""
    for name in names or ():
        if name not in SHAPES:
            raise ValueError(f"shapes: got {name!r}, expected all or some of {', '.join(SHAPES)}")
    return list(SHAPES.values()) if names is None else [SHAPES[name] for name in names]


def problem_of(shape: PagedShape) -> PagedProblem:
    """The problem that `make_inputs`' arrays pose."""
    return PagedProblem(
        op="paged_decode",
        batch=len(shape.lengths),
        tokens=shape.tokens,
        heads=shape.heads,
        latent=LATENT,
        rope=ROPE,
        page_size=shape.page_size,
        dtype=DTYPE,
        num_ids=max(shape.pages) * len(shape.lengths),
    )


def backend_for(shape: PagedShape, backend: str | None) -> str:
    """The backend that a call of this shape gets. Errors: as `paged_decode`'s."""
    return choose("paged_decode", BACKENDS, problem_of(shape), backend).name


def make_inputs(shape: PagedShape, seed: int = 0, dtype: str = DTYPE) -> PagedInputs:
    """Normal random queries and tokens, in pools of just the pages in use, in random order.

    Where the page size divides every length, the tokens' values do not depend on it.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    num_pages = sum(shape.pages)
    order = np.random.default_rng(seed).permutation(num_pages).astype(np.int32)
    table = np.zeros((len(shape.pages), max(shape.pages)), np.int32)
    table[np.arange(table.shape[1]) < np.array(shape.pages)[:, None]] = order
    page_of = np.argsort(order)

    def queries(key: Array, width: int) -> Array:
        return jax.random.normal(key, (len(shape.lengths), shape.tokens, shape.heads, width), dtype)

    def pool(key: Array, width: int) -> Array:
        tokens = jax.random.normal(key, (num_pages * shape.page_size, width), dtype)
        return tokens.reshape(num_pages, shape.page_size, width)[page_of]

    return PagedInputs(
        q_nope=queries(keys[0], LATENT),
        q_pe=queries(keys[1], ROPE),
        ckv=pool(keys[2], LATENT),
        kpe=pool(keys[3], ROPE),
        table=jnp.asarray(table),
        length=jnp.asarray(shape.lengths, jnp.int32),
    )


def _call(backend: str | None, deterministic: bool) -> Callable[..., Array]:
    def call(
        q_nope: Array, q_pe: Array, ckv: Array, kpe: Array, table: Array, length: Array
    ) -> Array:
        start = jnp.arange(table.shape[0], dtype=jnp.int32) * table.shape[1]
        pages = (table.reshape(-1), start, length)
        return paged_decode(
            *(q_nope, q_pe, ckv, kpe, *pages),
            sm_scale=DEFAULT_SM_SCALE,
            deterministic=deterministic,
            backend=backend,
        )[0]

    return call


def compile_ahead(
    shapes: Sequence[PagedShape], backend: str | None, deterministic: bool = False
) -> Programs:
    """(chain of CALLS, single call) of every shape, compiled side by side before any is timed."""

    def compiled(shape: PagedShape) -> tuple[Callable[..., Array], Callable[..., Array]]:
        args = jax.eval_shape(lambda: make_inputs(shape).args)
        call = jax.jit(_call(backend, deterministic))
        return tuple(jax.jit(program).lower(*args).compile() for program in (chained(call), call))  # pyright: ignore[reportReturnType]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((shape.name for shape in shapes), pool.map(compiled, shapes), strict=True))


def ours(
    inputs: PagedInputs,
    backend: str | None,
    deterministic: bool = False,
    programs: tuple[Callable[..., Array], Callable[..., Array]] | None = None,
) -> Contender:
    """`paged_decode`; its plan follows the lengths alone, so the chain computes it once.

    programs: those of `compile_ahead`, if they are there.
    """
    if programs is None:
        return jax_contender(_call(backend, deterministic), *inputs.args)
    chain, call = programs
    return Contender(
        burst=burst_of(chain, *inputs.args),
        output=lambda: np.asarray(call(*inputs.args).astype(jnp.float32)),
        calls=CALLS,
    )


def plan_microseconds(shape: PagedShape, backend: str, deterministic: bool = False) -> float:
    """The work plan as a program of its own, its launch included, so at most this in another.

    Decode makes one plan a step, however many layers use it.
    """
    problem, device = problem_of(shape), current_device()
    start = jnp.arange(problem.batch, dtype=jnp.int32) * (problem.num_ids // problem.batch)
    options = {"num_splits": None, "deterministic": deterministic}

    def plan(length: Array) -> Any:
        if backend == "mosaic_gpu":
            cluster = default_mosaic_tiles(problem)
            return plan_work(length, start, problem, cluster, device, **options)
        tiles = choose_tiles(problem, device)
        rows = jnp.full(problem.batch, problem.rows, jnp.int32)
        units = Units(
            base=jnp.arange(problem.batch, dtype=jnp.int32) * problem.rows,
            offset=jnp.zeros_like(rows),
            rows=rows,
            owned=rows,
            first_id=start,
            length=length,
            seen=length - problem.tokens + 1,
        )
        return pack(units, plan_splits(length, problem, tiles, device, **options))

    def arrays(length: Array) -> list[Array]:
        return [x for x in jax.tree.leaves(plan(length)) if not isinstance(x, int)]

    length = jnp.asarray(shape.lengths, jnp.int32)
    return seconds_a_run(jax.jit(arrays), length, burst=CALLS) * 1e6


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Frobenius."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_agreement(
    shape: str, peer: str, got: np.ndarray, want: np.ndarray, at_most: float = AGREEMENT
) -> None:
    """RuntimeError where the relative Frobenius error is not below `at_most`."""
    error = relative_error(got, want)
    if not error < at_most:
        raise RuntimeError(
            f"{shape}: our output is {error:.2e} away from {peer}'s, expected {at_most:.0e}"
        )


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """For each peer, the geometric mean of the ratios to it."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["peer"], []).append(row["ratio"])
    return {peer: statistics.geometric_mean(values) for peer, values in ratios.items()}


def bench_shape(
    shape: PagedShape,
    peers: dict[str, Peer],
    ceilings: dict[str, float],
    *,
    backend: str | None = None,
    deterministic: bool = False,
    seed: int = 0,
    programs: Programs | None = None,
) -> Iterator[Row]:
    """One row a peer, whose bursts and ours take turns: ratio is the peer's time over ours.

    A page size other than the peers' has one row, beside ours at theirs. plan_us, where we make a
    plan: see `plan_microseconds`. Errors: `paged_decode`'s;
    RuntimeError if the two outputs do not agree.
    """
    inputs = make_inputs(shape, seed)
    own = ours(inputs, backend, deterministic, (programs or {}).get(shape.name))
    output, name_of_ours = own.output(), backend_for(shape, backend)
    planned = (
        {}
        if name_of_ours == "reference"
        else {"plan_us": plan_microseconds(shape, name_of_ours, deterministic)}
    )
    if shape.page_size != PEERS_PAGE:
        paged_alike = make_inputs(dataclasses.replace(shape, page_size=PEERS_PAGE), seed)
        prepared = {f"page {PEERS_PAGE}": lambda: ours(paged_alike, backend, deterministic)}
    else:
        prepared = {name: lambda peer=peer: peer.prepare(inputs) for name, peer in peers.items()}
    for name, prepare in prepared.items():
        peer = prepare()
        check_agreement(shape.name, name, output, peer.output())
        ours_seconds, peer_seconds = alternating_seconds([own.burst, peer.burst])
        micros, peer_micros = ours_seconds / own.calls * 1e6, peer_seconds / peer.calls * 1e6
        row = {
            "op": "paged_decode",
            "shape": shape.name,
            "dtype": DTYPE,
            "page_size": shape.page_size,
            "backend": name_of_ours,
            "deterministic": deterministic,
            "ours_us": micros,
            **planned,
            "peer": name,
            "peer_us": peer_micros,
            "ratio": peer_micros / micros,
            **rates(shape.moved, shape.flops, micros, ceilings),
        }
        yield row | ({"xla_calls": peer.calls} if name == "xla" else {})
