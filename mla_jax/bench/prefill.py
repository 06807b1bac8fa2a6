"""Prefill attention, expanded (causal) and absorbed (paged), beside what runs without our kernels.

One request each. The expanded form is at DeepSeek's widths: 192 for queries and keys, 128 for
values. Arithmetic counts the pairs of query and key that causality leaves, T^2 / 2 of a whole
prompt: two products a pair forward, five backward, however many a kernel makes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax.bench import paged
from mla_jax.bench.peers import Contender, jax_contender
from mla_jax.bench.timing import alternating_seconds
from mla_jax.paged import DEFAULT_SM_SCALE
from pallas_kernels import causal_prefill, paged_prefill
from pallas_kernels.backend import choose
from pallas_kernels.paged_attention import PagedProblem

Row = dict[str, Any]
Attention = Callable[[Array, Array, Array], Array]
DTYPE = "bfloat16"
WIDTH, VALUE_WIDTH = 192, 128
CALLS, SLOW_CALLS = 4, 1
"""In a chain: of a kernel's calls, and of those that take many times as long."""
MOST_SCORES = 8 << 30
"""Bytes of scores up to which the naive peer runs."""
AGREEMENT = {"causal_prefill": 1e-2, "causal_prefill_backward": 2e-2, "paged_prefill": 1e-2}
# Of a pair of query and key in one head: what its products are wide together.
PRODUCTS = {
    "causal_prefill": WIDTH + VALUE_WIDTH,
    "causal_prefill_backward": 3 * WIDTH + 2 * VALUE_WIDTH,
    "paged_prefill": paged.WIDTH + paged.LATENT,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """A request of `length` positions, the last `tokens` of which are new."""

    name: str
    op: str
    heads: int
    tokens: int
    length: int

    @property
    def flops(self) -> int:
        twice_pairs = self.tokens * (2 * self.length - self.tokens)
        return self.heads * twice_pairs * PRODUCTS[self.op]


def _causal(tokens: int, backward: bool = False) -> PrefillShape:
    end = "_backward" if backward else ""
    return PrefillShape(
        name=f"h16-t{tokens}" + end.replace("_", "-"),
        op="causal_prefill" + end,
        heads=16,
        tokens=tokens,
        length=tokens,
    )


def _paged(tokens: int, heads: int) -> PrefillShape:
    name = f"B1-h{heads}-t{tokens}-s8192"
    return PrefillShape(name=name, op="paged_prefill", heads=heads, tokens=tokens, length=8192)


SHAPES = {
    shape.name: shape
    for shape in (
        _causal(8192),
        _causal(32768),
        _causal(8192, backward=True),
        *(_paged(tokens, heads) for heads in (16, 128) for tokens in (128, 2048)),
    )
}


def find_shapes(names: Sequence[str] | None) -> list[PrefillShape]:
    """The named shapes; None is all. Errors: ValueError, listing the names."""
    for name in names or ():
        if name not in SHAPES:
            raise ValueError(f"shapes: got {name!r}, expected all or some of {', '.join(SHAPES)}")
    return list(SHAPES.values()) if names is None else [SHAPES[name] for name in names]


def backend_for(shape: PrefillShape, backend: str | None) -> str:
    """The backend that a call of this shape gets. Errors: as the operation's."""
    if shape.op == "paged_prefill":
        problem = PagedProblem(
            op=shape.op,
            batch=1,
            tokens=0,
            heads=shape.heads,
            latent=paged.LATENT,
            rope=paged.ROPE,
            page_size=paged.PEERS_PAGE,
            dtype=DTYPE,
            num_ids=-(-shape.length // paged.PEERS_PAGE),
        )
        return choose(shape.op, paged_prefill.BACKENDS, problem, backend).name
    problem = causal_prefill.CausalProblem(
        batch=1,
        tokens=shape.tokens,
        keys=shape.length,
        heads=shape.heads,
        width=WIDTH,
        value_width=VALUE_WIDTH,
        dtype=DTYPE,
        causal=True,
    )
    return choose("causal_prefill", causal_prefill.BACKENDS, problem, backend).name


def causal_inputs(
    *, tokens: int, heads: int, dtype: str = DTYPE, seed: int = 0
) -> tuple[Array, Array, Array, Array, tuple[Array, ...]]:
    """Normal random q, k, v and a cotangent, and the ranges of one request that owns all rows."""
    keys = jax.random.split(jax.random.key(seed), 4)
    widths = (WIDTH, WIDTH, VALUE_WIDTH, VALUE_WIDTH)
    q, k, v, dout = (
        jax.random.normal(key, (tokens, heads, width), dtype)
        for key, width in zip(keys, widths, strict=True)
    )
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32)
    return q, k, v, dout, (start, count, start, count)


def paged_inputs(
    *,
    heads: int,
    tokens: int,
    length: int,
    page_size: int = paged.PEERS_PAGE,
    dtype: str = DTYPE,
    seed: int = 0,
) -> tuple[Array, ...]:
    """The arrays of a `paged_prefill` call for the last `tokens` of one request."""
    shape = paged.PagedShape(
        name="", lengths=(length,), heads=heads, tokens=tokens, page_size=page_size
    )
    inputs = paged.make_inputs(shape, seed, dtype)
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32)
    pools = (inputs.ckv, inputs.kpe, inputs.table.reshape(-1))
    return (inputs.q_nope[0], inputs.q_pe[0], *pools, start, inputs.length, start, count)


def naive_attention(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "tokens heads width"],
    v: Float[Array, "tokens heads value_width"],
) -> Float[Array, "tokens heads value_width"]:
    """Causal attention as one writes it without a kernel, at DeepSeek's scale."""
    scores = jnp.einsum("thd,khd->htk", q, k, preferred_element_type=jnp.float32)
    position = jnp.arange(q.shape[0])
    seen = position[None, :] <= position[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * DEFAULT_SM_SCALE, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("htk,khv->thv", weights, v)


def cudnn_attention(
    q: Float[Array, "tokens heads width"],
    k: Float[Array, "tokens heads width"],
    v: Float[Array, "tokens heads width"],
) -> Float[Array, "tokens heads width"]:
    """cuDNN's, through JAX's own interface, which wants values as wide as keys: padded ones."""
    return jax.nn.dot_product_attention(
        *(q[None], k[None], v[None]), scale=DEFAULT_SM_SCALE, is_causal=True, implementation="cudnn"
    )[0]


@functools.cache
def cudnn_lacks() -> str | None:
    """None if `cudnn_attention` compiles here, else why not."""
    array = jax.ShapeDtypeStruct((128, 1, WIDTH), DTYPE)
    try:
        jax.jit(cudnn_attention).lower(array, array, array).compile()
    except Exception as error:  # its checks raise three classes, XLA another
        return str(error).splitlines()[0]
    return None


def ours_causal(ranges: tuple[Int[Array, "1"], ...], backend: str | None) -> Attention:
    def attend(q: Array, k: Array, v: Array) -> Array:
        return causal_prefill.causal_prefill(
            q, k, v, *ranges, sm_scale=DEFAULT_SM_SCALE, backend=backend
        )[0]

    return attend


def _forward(attend: Attention, q: Array, k: Array, v: Array, calls: int) -> Contender:
    return jax_contender(lambda v, q, k: attend(q, k, v), v, q, k, calls=calls)


def _backward(
    attend: Attention, q: Array, k: Array, v: Array, dout: Array, calls: int
) -> Contender:
    """The backward pass alone, from a forward pass's residuals to all three gradients."""
    _, pull = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)

    def call(dout: Array, pull: Callable[[Array], tuple[Array, Array, Array]]) -> Array:
        dq, dk, dv = pull(dout)
        width = dv.shape[-1]
        return dv + dq[..., :width] + dk[..., :width]  # so that none goes unused

    return jax_contender(call, dout, pull, calls=calls)


def _causal_contenders(
    shape: PrefillShape, backend: str | None, seed: int
) -> tuple[Contender, dict[str, Callable[[], Contender]]]:
    q, k, v, dout, ranges = causal_inputs(tokens=shape.tokens, heads=shape.heads, seed=seed)

    def make(attend: Attention, calls: int = SLOW_CALLS, pad: int = 0) -> Contender:
        values, cotangent = (jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (v, dout))
        if shape.op == "causal_prefill":
            made = _forward(attend, q, k, values, calls)
        else:
            made = _backward(attend, q, k, values, cotangent, calls)
        return dataclasses.replace(made, output=lambda: made.output()[..., :VALUE_WIDTH])

    peers: dict[str, Callable[[], Contender]] = {}
    if cudnn_lacks() is None:
        peers["cudnn"] = lambda: make(cudnn_attention, CALLS, WIDTH - VALUE_WIDTH)
    if 4 * shape.heads * shape.tokens**2 <= MOST_SCORES:
        peers["xla"] = lambda: make(naive_attention)
    peers["reference"] = lambda: make(ours_causal(ranges, "reference"))
    return make(ours_causal(ranges, backend), CALLS), peers


def _paged_contenders(
    shape: PrefillShape, backend: str | None, seed: int
) -> tuple[Contender, dict[str, Callable[[], Contender]]]:
    args = paged_inputs(heads=shape.heads, tokens=shape.tokens, length=shape.length, seed=seed)

    def make(backend: str | None, calls: int) -> Contender:
        def call(*args: Array) -> Array:
            return paged_prefill.paged_prefill(
                *args, sm_scale=DEFAULT_SM_SCALE, max_count=shape.tokens, backend=backend
            )[0]

        return jax_contender(call, *args, calls=calls)

    return make(backend, CALLS), {"reference": lambda: make("reference", SLOW_CALLS)}


def bench_shape(
    shape: PrefillShape,
    ceilings: dict[str, float],
    *,
    backend: str | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """One row a peer that can run here, whose bursts and ours take turns.

    Errors: the operation's; RuntimeError if the two outputs do not agree.
    """
    contenders = _paged_contenders if shape.op == "paged_prefill" else _causal_contenders
    own, peers = contenders(shape, backend, seed)
    output = own.output()
    for name, prepare in peers.items():
        peer = prepare()
        paged.check_agreement(shape.name, name, output, peer.output(), AGREEMENT[shape.op])
        ours_seconds, peer_seconds = alternating_seconds([own.burst, peer.burst])
        micros, peer_micros = ours_seconds / own.calls * 1e6, peer_seconds / peer.calls * 1e6
        tflop_s = shape.flops / micros / 1e6
        yield {
            "op": shape.op,
            "shape": shape.name,
            "dtype": DTYPE,
            "backend": backend_for(shape, backend),
            "ours_us": micros,
            "peer": name,
            "peer_us": peer_micros,
            "ratio": peer_micros / micros,
            "tflop_s": tflop_s,
            "of_matmul": tflop_s / ceilings["matmul_tflop_s"],
        }
