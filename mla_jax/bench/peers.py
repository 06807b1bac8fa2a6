"""The peers of paged decode attention: what they are given, and how each is made ready to time."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mla_jax.bench.timing import CALLS, Burst, burst_of, chained
from mla_jax.paged import DEFAULT_SM_SCALE

LARGE = 1 << 30
"""Bytes that a naive call makes between its steps, from where it takes milliseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedInputs:
    """What every contender gets: queries, the cache's two pools, its page table and lengths."""

    q_nope: Float[Array, "batch tokens heads latent"]
    q_pe: Float[Array, "batch tokens heads rope"]
    ckv: Float[Array, "pages page latent"]
    kpe: Float[Array, "pages page rope"]
    table: Int[Array, "batch max_pages"]
    length: Int[Array, " batch"]

    @property
    def args(self) -> tuple[Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A program of `calls` calls: bursts of its runs, and one call's output in float32."""

    burst: Burst
    output: Callable[[], np.ndarray]
    calls: int


def jax_contender(call: Callable[..., Array], *args: Any, calls: int = CALLS) -> Contender:
    """`call(*args)`, whose result is like its first argument, chained within one jitted program."""
    return Contender(
        burst=burst_of(chained(call, calls), *args),
        output=lambda: np.asarray(jax.jit(call)(*args).astype(jnp.float32)),
        calls=calls,
    )


def naive_attention(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    ckv: Float[Array, "pages page latent"],
    kpe: Float[Array, "pages page rope"],
    table: Int[Array, "batch max_pages"],
    length: Int[Array, " batch"],
) -> Float[Array, "batch tokens heads latent"]:
    """Decode attention as one writes it without a kernel, at `DEFAULT_SM_SCALE`.

    Gathers every request's pages, padded to the longest, and scores all of them. Query token i
    sees the keys j <= length - tokens + i. Scores and softmax are in float32.
    """
    (batch, tokens), latent = q_nope.shape[:2], q_nope.shape[-1]
    q = jnp.concatenate([q_nope, q_pe], axis=-1)
    keys = jnp.concatenate([ckv[table], kpe[table]], axis=-1).reshape(batch, -1, q.shape[-1])
    scores = jnp.einsum("bshd,bkd->bshk", q, keys, preferred_element_type=jnp.float32)
    last = length[:, None] - tokens + jnp.arange(tokens)
    seen = jnp.arange(keys.shape[1]) <= last[..., None]  # [batch, tokens, keys]
    scores = jnp.where(seen[:, :, None], scores * DEFAULT_SM_SCALE, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(keys.dtype)
    return jnp.einsum("bshk,bkc->bshc", weights, keys[..., :latent])


def depending(
    table: Int[Array, "batch max_pages"], q: Float[Array, "..."]
) -> Int[Array, "batch max_pages"]:
    """The same table, for a gather that each call of a chain makes for itself.

    A gather does not depend on the queries: XLA would do it once for all calls. Adding (q != q),
    which is 0 but not provably so, prevents that.
    """
    first = q[(0,) * q.ndim]
    return table + (first != first).astype(table.dtype)


def _naive_call(
    q_nope: Array, q_pe: Array, ckv: Array, kpe: Array, table: Array, length: Array
) -> Array:
    return naive_attention(q_nope, q_pe, ckv, kpe, depending(table, q_nope), length)


def xla(inputs: PagedInputs) -> Contender:
    """`naive_attention` as XLA compiles it; where a call is large, fewer of them in the chain."""
    batch, tokens, heads, _ = inputs.q_nope.shape
    keys = inputs.table.shape[1] * inputs.ckv.shape[1]
    width = inputs.ckv.shape[-1] + inputs.kpe.shape[-1]
    gathered = batch * keys * width * inputs.ckv.dtype.itemsize
    scores = batch * tokens * heads * keys * 4
    calls = CALLS if gathered + scores < LARGE else CALLS // 4
    return jax_contender(_naive_call, *inputs.args, calls=calls)


def flash_mla_lacks() -> str | None:
    """None if FlashMLA's Hopper kernel can run here, else what is missing."""
    modules = {"torch": "torch", "flash_mla": "sgl-flash-mla (pip install --no-deps)"}
    absent = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if absent:
        return " and ".join(absent)
    cuda = import_module("torch").cuda
    if not cuda.is_available() or cuda.get_device_capability() != (9, 0):
        return "a Hopper GPU that torch can use"
    return None


def flash_mla(inputs: PagedInputs) -> Contender:
    """FlashMLA's dense Hopper kernel, of PyPI's sgl-flash-mla, in one CUDA graph.

    Its cache holds latent and rope side by side in pages of 64: a copy of ours. It cuts the work
    in its first call, outside the graph, and keeps that plan for the later ones.
    """
    torch, package = import_module("torch"), import_module("flash_mla")
    torch.cuda.empty_cache()  # the last shape's memory, which JAX may want
    q_nope, q_pe, ckv, kpe, table, length = map(torch.from_dlpack, inputs.args)
    q = torch.cat([q_nope, q_pe], dim=-1)
    cache = torch.cat([ckv, kpe], dim=-1).unsqueeze(2)
    plan, _ = package.get_mla_metadata()

    def call():
        out, _ = package.flash_mla_with_kvcache(
            q,
            cache,
            table,
            length,
            head_dim_v=ckv.shape[-1],
            tile_scheduler_metadata=plan,
            softmax_scale=DEFAULT_SM_SCALE,
            causal=q.shape[1] > 1,
            is_fp8_kvcache=False,
            use_legacy=True,
        )
        return out

    return _captured(torch, call)


def flash_mla_sparse(
    q_nope: Float[Array, "batch tokens heads latent"],
    q_pe: Float[Array, "batch tokens heads rope"],
    rows: UInt8[Array, "pages page bytes"],
    indices: Int[Array, "batch tokens topk"],
) -> Contender:
    """FlashMLA's sparse Hopper kernel over an fp8 cache, of PyPI's sgl-flash-mla, as `flash_mla`.

    rows: the cache in 656 bytes a token, as `QuantizedLatents.packed` makes them.
    """
    torch, package = import_module("torch"), import_module("flash_mla")
    torch.cuda.empty_cache()
    nope, pe, cache, listed = map(torch.from_dlpack, (q_nope, q_pe, rows, indices))
    q = torch.cat([nope, pe], dim=-1)
    cache = cache.view(torch.float8_e4m3fn).unsqueeze(2)
    plan, _ = package.get_mla_metadata()

    def call():
        out, _ = package.flash_mla_with_kvcache(
            *(q, cache, None, None),
            head_dim_v=nope.shape[-1],
            tile_scheduler_metadata=plan,
            softmax_scale=DEFAULT_SM_SCALE,
            is_fp8_kvcache=True,
            indices=listed,
            use_legacy=True,
        )
        return out

    return _captured(torch, call)


def _captured(torch: Any, call: Callable[[], Any]) -> Contender:
    """CALLS calls in one CUDA graph."""
    # PyTorch asks for a warm-up on another stream before it captures.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def burst(runs: int) -> None:
        for _ in range(runs):
            graph.replay()
        torch.cuda.synchronize()

    return Contender(burst=burst, output=lambda: call().float().cpu().numpy(), calls=CALLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """How a contender is made, and `lacks()`: None, or what is missing here."""

    prepare: Callable[[PagedInputs], Contender]
    lacks: Callable[[], str | None] = lambda: None


PEERS = {
    "flash-mla": Peer(prepare=flash_mla, lacks=flash_mla_lacks),
    "xla": Peer(prepare=xla),
}


def find_peers(names: Sequence[str] | None) -> dict[str, Peer]:
    """The named peers; None is all that can run here.

    Errors: ValueError (a name nobody has), ImportError (a peer that lacks something).
    """
    if names is None:
        return {name: peer for name, peer in PEERS.items() if peer.lacks() is None}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"against: got {name!r}, expected some of {', '.join(PEERS)}")
        if missing := PEERS[name].lacks():
            raise ImportError(f"against: {name} needs {missing}")
    return {name: PEERS[name] for name in names}
