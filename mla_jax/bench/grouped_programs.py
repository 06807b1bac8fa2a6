"""What `mla_jax.bench.grouped` measures: shapes, their inputs, and the programs of every contender.

Peers are `jax.nn.dot_product_attention`, in cuDNN's implementation and in XLA's. It has no pages: a
decode call gathers them first, which counts, or finds its keys side by side already.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mla_jax.bench.peers import LARGE, depending
from mla_jax.bench.prefill import CALLS as PREFILL_CALLS
from mla_jax.bench.prefill import MOST_SCORES
from mla_jax.bench.timing import CALLS
from mla_jax.flash_mla import flash_mla_prefill, flash_mla_with_kvcache
from pallas_kernels import grouped_decode, sparse_prefill
from pallas_kernels.backend import choose
from pallas_kernels.grouped_attention.blocks import BLOCK
from pallas_kernels.grouped_decode.tiles import problem_of

Inputs = dict[str, Any]
Implementation = Literal["cudnn", "xla"]
Pattern = Literal["dense", "causal", "blocks25"]
DTYPE = "bfloat16"
ITEMSIZE = 2
KEPT = 0.25
"""Of a row of blocks, in the pattern blocks25: the diagonal's, and others at random."""
CHECKED = 250
"""Queries of a prompt whose outputs are compared: about so many, at all places of a block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`call` of the inputs that `needs` names, whose result is like the first of these.

    It is timed in a chain of `calls`. `seen(result)` is what is compared, and `expected(inputs)`
    what it should be; ours: a peer that is wrong, or does not compile, is left out.
    """

    call: Callable[..., Array]
    needs: tuple[str, ...]
    calls: int
    seen: Callable[[Array], Array]
    expected: Callable[[Inputs], Array]
    ours: bool = False

    def arguments(self, inputs: Inputs) -> list[Any]:
        return [inputs[name] for name in self.needs]


def plain_attention(
    q: Float[Array, "heads rows width"],
    k: Float[Array, "heads keys width"],
    v: Float[Array, "heads keys width"],
    visible: Bool[Array, "*#heads #rows keys"],
) -> Float[Array, "heads rows width"]:
    """What every contender should give: float32 throughout, nothing clever."""
    scores = jnp.einsum("hrd,hkd->hrk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf))
    return jnp.einsum("hrk,hkd->hrd", weights, v.astype(jnp.float32))


def jax_attention(
    q: Float[Array, "batch rows heads width"],
    k: Float[Array, "batch keys kv_heads width"],
    v: Float[Array, "batch keys kv_heads width"],
    **options: Any,
) -> Float[Array, "batch rows heads width"]:
    """JAX's own, which mixes dtypes, also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, **options)


def gather_tokens(
    cache: Float[Array, "batch kv_heads blocks block width"], table: Int[Array, "batch blocks"]
) -> Float[Array, "batch tokens kv_heads width"]:
    """The cache's tokens in order, as `jax.nn.dot_product_attention` wants them."""
    ordered = jax.vmap(lambda own, ids: jnp.take(own, ids, axis=1, mode="clip"))(cache, table)
    batch, kv_heads, _, _, width = cache.shape
    return jnp.swapaxes(ordered.reshape(batch, kv_heads, -1, width), 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """A decode step of `batch` requests, each of `length` cached tokens in full blocks of 64.

    bars: the ratio that each named peer's row should reach; bar_of_copy: our bytes a second over
    the copy rate of the same run.
    """

    op: ClassVar[str] = "grouped_decode"
    name: str
    batch: int
    heads: int
    kv_heads: int
    width: int
    length: int
    bars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bar_of_copy: float | None = None

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.length * self.width

    @property
    def moved(self) -> int:
        """Bytes that one call must read or write: keys and values, queries and outputs."""
        rows = self.batch * (self.kv_heads * self.length + self.heads)
        return 2 * rows * self.width * ITEMSIZE

    def draw(self, key: Array) -> Inputs:
        """Normal random arrays; a request's blocks lie in random order. k, v: the same tokens."""
        keys = jax.random.split(key, 4)
        blocks = self.length // BLOCK
        caches = (self.batch, self.kv_heads, blocks, BLOCK, self.width)
        k_cache, v_cache = (jax.random.normal(each, caches, DTYPE) for each in keys[:2])
        order = functools.partial(jax.random.permutation, x=jnp.arange(blocks, dtype=jnp.int32))
        table = jax.vmap(order)(jax.random.split(keys[2], self.batch))
        return {
            "q": jax.random.normal(keys[3], (self.batch, self.heads, 1, self.width), DTYPE),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "table": table,
            "length": jnp.full(self.batch, self.length, jnp.int32),
            "k": gather_tokens(k_cache, table),
            "v": gather_tokens(v_cache, table),
        }

    def chosen(self, backend: str | None) -> str:
        """The backend that our call gets. Errors: as the operation's."""
        inputs = jax.eval_shape(self.draw, jax.random.key(0))
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.width), DTYPE)
        problem = problem_of(q, inputs["k_cache"])  # pyright: ignore[reportArgumentType]
        return choose(self.op, grouped_decode.BACKENDS, problem, backend).name

    def programs(self, backend: str | None) -> dict[str, Program]:
        """Ours, and each peer over gathered pages and over keys already contiguous."""

        def own(q: Array, k_cache: Array, v_cache: Array, table: Array, length: Array) -> Array:
            return flash_mla_with_kvcache(q, k_cache, v_cache, table, length, backend=backend)

        def contiguous(implementation: Implementation) -> Callable[..., Array]:
            def call(q: Array, k: Array, v: Array, length: Array) -> Array:
                out = jax_attention(
                    *(jnp.swapaxes(q, 1, 2), k, v),
                    key_value_seq_lengths=length,
                    implementation=implementation,
                )
                return jnp.swapaxes(out, 1, 2)

            return call

        def gathering(implementation: Implementation) -> Callable[..., Array]:
            attend = contiguous(implementation)

            def call(
                q: Array, k_cache: Array, v_cache: Array, table: Array, length: Array
            ) -> Array:
                table = depending(table, q)
                tokens = (gather_tokens(cache, table) for cache in (k_cache, v_cache))
                return attend(q, *tokens, length)

            return call

        make = functools.partial(Program, seen=self._rows, expected=self._expected)
        paged = ("q", "k_cache", "v_cache", "table", "length")
        calls = CALLS if self.moved < LARGE else CALLS // 4
        made = {"ours": make(call=own, needs=paged, calls=CALLS, ours=True)}
        for name in ("cudnn", "xla"):
            made[name] = make(call=gathering(name), needs=paged, calls=calls)
            needs = ("q", "k", "v", "length")
            made[f"{name} contiguous"] = make(call=contiguous(name), needs=needs, calls=calls)
        return made

    def _rows(self, out: Array) -> Float[Array, "heads rows width"]:
        """Of queries or outputs, those that share a key head together."""
        return out.reshape(self.batch * self.kv_heads, -1, self.width)

    def _expected(self, inputs: Inputs) -> Array:
        k, v = (
            jnp.swapaxes(inputs[name], 1, 2).reshape(-1, self.length, self.width)
            for name in ("k", "v")
        )
        length = jnp.repeat(inputs["length"], self.kv_heads)[:, None, None]
        return plain_attention(self._rows(inputs["q"]), k, v, jnp.arange(self.length) < length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """One prompt of `tokens`, a multiple of 64, whose queries see the keys of a pattern.

    dense: all of them. causal: those up to their own. blocks25: those of a quarter of all blocks
    of 64 queries and 64 keys. bars: the ratio that each named peer's row should reach.
    """

    op: ClassVar[str] = "sparse_prefill"
    bar_of_copy: ClassVar[None] = None
    name: str
    heads: int
    width: int
    tokens: int
    pattern: Pattern
    bars: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.tokens // BLOCK

    @property
    def kept(self) -> int:
        """Blocks of keys that a block of queries sees in the pattern blocks25."""
        return max(1, round(KEPT * self.blocks))

    @property
    def flops(self) -> int:
        pairs = {
            "dense": self.tokens**2,
            "causal": self.tokens * (self.tokens + 1) // 2,
            "blocks25": self.tokens * self.kept * BLOCK,
        }
        return 4 * self.heads * pairs[self.pattern] * self.width

    @property
    def moved(self) -> int:
        """Bytes of queries, keys, values and outputs."""
        return 4 * self.heads * self.tokens * self.width * ITEMSIZE

    def draw(self, key: Array) -> Inputs:
        """Normal random q, k, v, heads first, the same with heads second, and a layout."""
        keys = jax.random.split(key, 4)
        shape = (1, self.heads, self.tokens, self.width)
        made = {
            name: jax.random.normal(each, shape, DTYPE)
            for name, each in zip("qkv", keys[:3], strict=True)
        }
        for name in "qkv":
            made[f"{name}_by_token"] = jnp.swapaxes(made[name], 1, 2)
        drawn = jax.random.uniform(keys[3], (self.blocks, self.blocks))
        drawn = jnp.where(jnp.eye(self.blocks, dtype=bool), -1.0, drawn)
        rank = jnp.argsort(jnp.argsort(drawn, axis=1), axis=1)
        made["layout"] = rank < self.kept
        return made

    def chosen(self, backend: str | None) -> str:
        """The backend that our call gets. Errors: as the operation's."""
        problem = sparse_prefill.SparseProblem(
            batch=1,
            heads=self.heads,
            kv_heads=self.heads,
            tokens=self.tokens,
            width=self.width,
            dtype=DTYPE,
            causal=self.pattern == "causal",
            paged=False,
            layout=(1, 1) if self.pattern == "blocks25" else None,
            mask=None,
        )
        return choose(self.op, sparse_prefill.BACKENDS, problem, backend).name

    def programs(self, backend: str | None) -> dict[str, Program]:
        """Ours; ours that looks at all keys (dense), and peers, which know of no layouts."""
        known: Pattern = "causal" if self.pattern == "causal" else "dense"
        made = {"ours": self._ours(self.pattern, backend)}
        if self.pattern != "dense":
            made["dense"] = self._ours("dense", backend)
        made["cudnn"] = self._peer("cudnn", known, PREFILL_CALLS)
        if 4 * self.heads * self.tokens**2 <= MOST_SCORES:
            made["xla"] = self._peer("xla", known, 1)
        return made

    def _ours(self, pattern: Pattern, backend: str | None) -> Program:
        def call(q: Array, k: Array, v: Array, layout: Array | None = None) -> Array:
            if pattern == "causal":
                return flash_mla_prefill(q, k, v, backend=backend)
            # FlashMLA's call is causal where it has no mask; the kernel behind it need not be.
            return sparse_prefill.sparse_prefill(
                *(q, k, v),
                layout=layout,
                sm_scale=self.width**-0.5,
                causal=False,
                backend=backend,
            )[0]

        return Program(
            call=call,
            needs=("q", "k", "v", "layout") if pattern == "blocks25" else ("q", "k", "v"),
            calls=PREFILL_CALLS,
            seen=self._some,
            expected=functools.partial(self._expected, pattern),
            ours=True,
        )

    def _peer(self, implementation: Implementation, pattern: Pattern, calls: int) -> Program:
        def call(q: Array, k: Array, v: Array) -> Array:
            return jax_attention(
                q, k, v, is_causal=pattern == "causal", implementation=implementation
            )

        return Program(
            call=call,
            needs=("q_by_token", "k_by_token", "v_by_token"),
            calls=calls,
            seen=lambda out: self._some(jnp.swapaxes(out, 1, 2)),
            expected=functools.partial(self._expected, pattern),
        )

    def _some(self, array: Array) -> Array:
        """Of queries or outputs, heads first, those that are compared."""
        some = array[..., :: self._step, :]
        return some.reshape(-1, *some.shape[-2:])

    @property
    def _step(self) -> int:
        return max(1, self.tokens // CHECKED)

    def _expected(self, pattern: Pattern, inputs: Inputs) -> Array:
        key = jnp.arange(self.tokens)
        row = key[:: self._step, None]
        visible = jnp.ones((row.size, self.tokens), bool)
        if pattern == "causal":
            visible = key <= row
        elif pattern == "blocks25":
            visible = inputs["layout"][row // BLOCK, key // BLOCK]
        return plain_attention(self._some(inputs["q"]), inputs["k"][0], inputs["v"][0], visible)


Shape = DecodeShape | PrefillShape
