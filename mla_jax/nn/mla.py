"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434), over three kinds of cache."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax.cache import (
    AbsorbCache,
    LatentPool,
    NaiveCache,
    PageView,
    append,
    causal,
    pool_and_scales,
    read_pages,
    write_pages,
)
from mla_jax.config import MLAConfig
from mla_jax.nn.indexer import Indexer
from mla_jax.nn.linear import Linear, einsum, plain
from mla_jax.nn.norm import RMSNorm
from mla_jax.quantization import QuantizedPool
from mla_jax.rope import apply_rotary, rotation
from mla_jax.sharding.collectives import (
    merge_over_context,
    once_over_context,
    parts,
    sum_over_model,
)
from mla_jax.sharding.mesh import CONTEXT_AXIS, MODEL_AXIS
from pallas_kernels.backend import supports
from pallas_kernels.causal_prefill import BACKENDS, CausalProblem, causal_prefill
from pallas_kernels.merge import merge_states
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.token_sparse import token_sparse

Rotation = tuple[Array, Array]
AttnImpl = Literal["naive", "absorb"]

CONTEXT_TOKENS = 8192
"""Cached tokens, of all rows together, whose keys and values exist at a time in a prefill."""


class MLA(nnx.Module):
    """Attention whose keys and values are rebuilt from one latent vector a token.

    `naive` expands the latent to full keys and values; `absorb` folds that expansion into the
    query and the output, so that attention runs in the latent space: the same result, and a cache
    of kv_lora_rank + qk_rope_head_dim numbers a token. Weights are [out, in]; wq, wq_b and wkv_b
    are annotated to split by heads, wo by its inputs. With an indexer (`config.index_n_heads`) a
    token attends to the index_topk tokens that it chooses among those up to its own.

    >>> from flax import nnx
    >>> config = MLAConfig(dim=32, n_heads=2, kv_lora_rank=16, dtype="float32")
    >>> MLA(config, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 32))).shape
    (1, 3, 32)
    """

    def __init__(self, config: MLAConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, dtype = config.n_heads, config.dtype
        by_heads = (MODEL_AXIS, None)
        if config.q_lora_rank == 0:
            self.wq = Linear(
                config.dim, heads * config.qk_head_dim, dtype, rngs=rngs, shards=by_heads
            )
        else:
            self.wq_a = Linear(config.dim, config.q_lora_rank, dtype, rngs=rngs)
            self.q_norm = RMSNorm(config.q_lora_rank, dtype)
            self.wq_b = Linear(
                config.q_lora_rank, heads * config.qk_head_dim, dtype, rngs=rngs, shards=by_heads
            )
        self.wkv_a = Linear(
            config.dim, config.kv_lora_rank + config.qk_rope_head_dim, dtype, rngs=rngs
        )
        self.kv_norm = RMSNorm(config.kv_lora_rank, dtype)
        self.wkv_b = Linear(
            config.kv_lora_rank,
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            dtype,
            rngs=rngs,
            shards=by_heads,
        )
        self.wo = Linear(
            heads * config.v_head_dim, config.dim, dtype, rngs=rngs, shards=(None, MODEL_AXIS)
        )
        self.indexer = Indexer(config, rngs=rngs) if config.index_n_heads else None

    @overload
    def __call__(self, x: Array, *, attn_impl: AttnImpl | None = None) -> Array: ...
    @overload
    def __call__(
        self, x: Array, cache: NaiveCache, start_pos: int | Array = 0
    ) -> tuple[Array, NaiveCache]: ...
    @overload
    def __call__(
        self, x: Array, cache: AbsorbCache, start_pos: int | Array = 0
    ) -> tuple[Array, AbsorbCache]: ...

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        cache: NaiveCache | AbsorbCache | None = None,
        start_pos: int | Int[Array, ""] = 0,
        *,
        attn_impl: AttnImpl | None = None,
    ):
        """Causal attention of tokens start_pos..start_pos+S over themselves and the cache.

        Without a cache, whole sequences from position 0 -> out [B, S, dim]. With one (NaiveCache
        or AbsorbCache, which fixes `attn_impl`) the new tokens are appended -> (out, cache).
        Errors: ValueError for an unknown attn_impl, one that is not the cache's, a chunk longer
        than the cache, or a cache of more than index_topk tokens with an indexer, whose keys are
        cached in pages alone.
        """
        batch, tokens, _ = x.shape
        impl = attn_impl or ("absorb" if isinstance(cache, AbsorbCache) else "naive")
        kinds = {"naive": NaiveCache, "absorb": AbsorbCache}
        if impl not in kinds:
            raise ValueError(f"attn_impl: got {impl!r}, expected 'naive' or 'absorb'")
        kind = kinds[impl]
        if cache is None:
            if not (isinstance(start_pos, int) and start_pos == 0):
                raise ValueError(f"start_pos: got {start_pos}, expected 0 without a cache")
            filled = kind.create(self.config, batch=batch, max_seq_len=tokens)
        elif not isinstance(cache, kind):
            raise ValueError(
                f"attn_impl: got {impl!r} with a {type(cache).__name__}, expected {kind.__name__}"
            )
        else:
            filled = cache
        time = jax.tree.leaves(filled)[0].shape[1]
        if isinstance(start_pos, int) and start_pos < 0:
            raise ValueError(f"start_pos: got {start_pos}, expected 0 or more")
        if tokens + (start_pos if isinstance(start_pos, int) else 0) > time:
            raise ValueError(f"x: got {tokens} tokens at {start_pos}, cache has room for {time}")

        positions = start_pos + jnp.arange(tokens, dtype=jnp.int32)
        rope = rotation(self.config, positions)
        q_nope, q_pe, ckv, kpe = self.project(x, rope)
        visible = causal(positions, time)
        if self.indexer is not None and time > self.config.index_topk:
            if cache is not None:
                raise ValueError(
                    f"cache: got room for {time} tokens, expected at most "
                    f"{self.config.index_topk=} with an indexer; pages can hold more"
                )
            visible = self.indexer.visible(x, self.query_latent(x), rope)
        if isinstance(filled, NaiveCache):
            k, v = self.expand(ckv, kpe)
            filled = NaiveCache(k=append(filled.k, k, start_pos), v=append(filled.v, v, start_pos))
            out = self._attend_naive(q_nope, q_pe, filled, visible)
        else:
            filled = AbsorbCache(
                ckv=append(filled.ckv, ckv, start_pos), kpe=append(filled.kpe, kpe, start_pos)
            )
            out = self._attend_absorb(q_nope, q_pe, filled, visible)
        out = self.wo(out.reshape(batch, tokens, -1))
        return out if cache is None else (out, filled)

    def paged(
        self,
        x: Float[Array, "batch tokens dim"],
        ckv_pool: Float[Array, "pages page latent"] | QuantizedPool,
        kpe_pool: Float[Array, "pages page rope"],
        view: PageView,
        rope: Rotation,
        *,
        indices: Int[Array, "batch tokens topk"] | None = None,
        backend: str | None = None,
        interpret: bool = False,
    ) -> tuple[Array, LatentPool, Array]:
        """Write this call's tokens to the layer's pools, then attend over the rows' pages.

        rope: (cos, sin) at view.positions. indices: what each token attends to, by the indexer's
        `paged`; None: all tokens up to its own. Returns (out [B, S, dim], ckv_pool, kpe_pool). On a
        mesh the rows' pages are spread over its context axis: each device attends over its own.
        """
        batch, tokens, _ = x.shape
        q_nope, q_pe, ckv, kpe = self.project(x, rope)
        ckv_pool, kpe_pool = write_pages(ckv_pool, view, ckv), write_pages(kpe_pool, view, kpe)
        kernel = {
            "sm_scale": self.config.softmax_scale,
            "backend": backend,
            "interpret": interpret,
        }
        # Only in the expanded form do the new keys, which all context devices have, stand apart.
        expanded = parts(CONTEXT_AXIS) > 1 or (self.expands(tokens) and self._has_expanded(backend))
        if tokens > 1 and expanded and indices is None:
            new = (q_nope, q_pe, ckv, kpe)
            out, lse = self._prefill_expanded(*new, ckv_pool, kpe_pool, view, kernel)
        else:
            pools = ckv_pool, kpe_pool
            out, lse = self._attend_pages(q_nope, q_pe, *pools, view, indices, kernel)
        out = merge_over_context(out, lse).reshape(batch, tokens, -1)
        return sum_over_model(self.wo(out)), ckv_pool, kpe_pool

    def expands(self, tokens: int) -> bool:
        """Whether so many queries a row cost less with full keys and values than in the latent.

        Counts multiplications a key: expanding it costs once what its narrower products save with
        each query. That is from 171 queries on at DeepSeek's sizes.
        """
        c = self.config
        latent, value = c.kv_lora_rank, c.v_head_dim
        saved = 2 * latent + c.qk_rope_head_dim - c.qk_head_dim - value
        return tokens * saved > latent * (c.qk_nope_head_dim + value)

    def _has_expanded(self, backend: str | None) -> bool:
        """Whether `backend` takes heads of these widths: all have the latent form, at least."""
        c = self.config
        problem = CausalProblem(
            batch=1,
            tokens=1,
            keys=1,
            heads=self._wkv_b()[0].shape[0],
            width=c.qk_head_dim,
            value_width=c.v_head_dim,
            dtype=c.dtype,
            causal=True,
        )
        return supports(BACKENDS, problem, backend)

    def _attend_pages(
        self,
        q_nope: Array,
        q_pe: Array,
        ckv_pool: LatentPool,
        kpe_pool: Array,
        view: PageView,
        indices: Int[Array, "batch tokens topk"] | None,
        kernel: dict[str, Any],
    ) -> tuple[Float[Array, "batch tokens heads value"], Float[Array, "batch tokens heads"]]:
        """Attention over pages in the latent space: decode, prefill of few tokens, chosen tokens.

        Returns (values, base-2 log-sum-exp).
        """
        tokens = q_nope.shape[1]
        q_latent = self.absorb_query(q_nope)
        held = view.held(view.length, ckv_pool.shape[1])
        ckv, kv_scales = pool_and_scales(ckv_pool)
        pages = (ckv, kpe_pool, view.page_ids, view.start, held)
        kernel = {**kernel, "kv_scales": kv_scales}
        if indices is not None:
            q_latents, q_pes, chosen = (
                jax.lax.collapse(array, 0, 2) for array in (q_latent, q_pe, indices)
            )
            out, lse = token_sparse(q_latents, q_pes, ckv, kpe_pool, chosen, **kernel)
        elif tokens == 1:
            out, lse = paged_decode(q_latent, q_pe, *pages, **kernel)
        else:
            out, lse = paged_prefill(
                *(jax.lax.collapse(q_latent, 0, 2), jax.lax.collapse(q_pe, 0, 2)),
                *(*pages, view.row_starts, view.counts),
                max_count=tokens,
                **kernel,
            )
        return self.expand_values(out.reshape(q_latent.shape)), lse.reshape(q_latent.shape[:-1])

    def _prefill_expanded(
        self,
        q_nope: Array,
        q_pe: Array,
        ckv: Array,
        kpe: Array,
        ckv_pool: LatentPool,
        kpe_pool: Array,
        view: PageView,
        kernel: dict[str, Any],
    ) -> tuple[Float[Array, "batch tokens heads value"], Float[Array, "batch tokens heads"]]:
        """Attention with full keys and values: over the new tokens, then over those cached before.

        The cached ones are expanded a block at a time, and the results merged by their
        log-sum-exp; the loop runs as often as the longest row needs. Returns (values, lse).
        """
        batch, tokens = q_nope.shape[:2]
        num_pages, page_size = ckv_pool.shape[:2]
        rows = view.row_starts
        q = jnp.concatenate([q_nope, q_pe], axis=-1)
        q = q.reshape(batch * tokens, *q.shape[2:])

        def attend(ckv: Array, kpe: Array, kv_count: Array, causal: bool) -> tuple[Array, Array]:
            time = ckv.shape[1]
            k, v = (x.reshape(batch * time, *x.shape[2:]) for x in self.expand(ckv, kpe))
            kv_start = jnp.arange(batch, dtype=jnp.int32) * time
            ranges = rows, view.counts, kv_start, kv_count
            return causal_prefill(q, k, v, *ranges, causal=causal, **kernel)

        cached = view.held(view.length - view.counts, page_size)
        pages = max(1, CONTEXT_TOKENS // (batch * page_size))
        block = pages * page_size

        def context(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            slots = view.start[:, None] + i * pages + jnp.arange(pages, dtype=jnp.int32)
            ids = view.page_ids[jnp.clip(slots, 0, view.page_ids.shape[0] - 1)]
            ids = jnp.clip(ids, 0, num_pages - 1)
            ckv, kpe = (
                read_pages(pool, ids, q.dtype).reshape(batch, block, -1)
                for pool in (ckv_pool, kpe_pool)
            )
            count = jnp.clip(cached - i * block, 0, block)
            return merge_states(*state, *attend(ckv, kpe, count, causal=False))

        new, lse = attend(ckv, kpe, view.counts, causal=True)
        state = new, once_over_context(lse)
        blocks = (cached.max() + block - 1) // block
        out, lse = jax.lax.fori_loop(jnp.int32(0), blocks, context, state)
        return out.reshape(batch, tokens, *out.shape[1:]), lse.reshape(batch, tokens, -1)

    def project(
        self, x: Float[Array, "batch tokens dim"], rope: Rotation
    ) -> tuple[
        Float[Array, "batch tokens heads nope"],
        Float[Array, "batch tokens heads rope"],
        Float[Array, "batch tokens latent"],
        Float[Array, "batch tokens rope"],
    ]:
        """(q_nope, rotated q_pe, normalised latent, rotated k_pe) of tokens at `rope`'s places."""
        config = self.config
        cos, sin = rope
        q = self.wq(x) if config.q_lora_rank == 0 else self.wq_b(self.query_latent(x))
        q = q.reshape(*x.shape[:-1], -1, config.qk_head_dim)
        q_nope, q_pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        q_pe = apply_rotary(
            q_pe, cos[..., None, :], sin[..., None, :], interleave=config.rope_interleave
        )
        ckv, kpe = jnp.split(self.wkv_a(x), [config.kv_lora_rank], axis=-1)
        kpe = apply_rotary(kpe, cos, sin, interleave=config.rope_interleave)
        return q_nope, q_pe, self.kv_norm(ckv), kpe

    def query_latent(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens rank"]:
        """The normalised query latent; XLA makes it once for the queries and the indexer."""
        return self.q_norm(self.wq_a(x))

    def _wkv_b(
        self,
    ) -> tuple[Float[Array, "heads nope latent"], Float[Array, "heads value latent"]]:
        config = self.config
        width = config.qk_nope_head_dim + config.v_head_dim
        weight = plain(self.wkv_b.weight[...], config.dtype)
        weight = weight.reshape(-1, width, config.kv_lora_rank)
        return weight[:, : config.qk_nope_head_dim], weight[:, config.qk_nope_head_dim :]

    def absorb_query(
        self, q_nope: Float[Array, "batch tokens heads nope"]
    ) -> Float[Array, "batch tokens heads latent"]:
        """The query that scores latents as q_nope would score their expanded keys."""
        w_k = self._wkv_b()[0]
        if q_nope.shape[:2] == (1, 1):
            # Of a product with one row XLA writes out every term, transposed, before it sums.
            terms = q_nope[..., None].astype(jnp.float32) * w_k.astype(jnp.float32)
            return terms.sum(axis=-2).astype(q_nope.dtype)
        return einsum("bshn,hnc->bshc", q_nope, w_k)

    def expand_values(
        self, out: Float[Array, "batch tokens heads latent"]
    ) -> Float[Array, "batch tokens heads value"]:
        """A sum of latents -> the sum of the values that they stand for."""
        return einsum("bshc,hvc->bshv", out, self._wkv_b()[1])

    def expand(
        self, ckv: Float[Array, "batch time latent"], kpe: Float[Array, "batch time rope"]
    ) -> tuple[Float[Array, "batch time heads qk"], Float[Array, "batch time heads value"]]:
        """Full keys (nope | rope) and values of every head."""
        w_k, w_v = self._wkv_b()
        k_nope = einsum("btc,hnc->bthn", ckv, w_k)
        k_pe = jnp.broadcast_to(kpe[:, :, None], (*k_nope.shape[:-1], kpe.shape[-1]))
        return jnp.concatenate([k_nope, k_pe], axis=-1), einsum("btc,hvc->bthv", ckv, w_v)

    def _probs(self, scores: Array, visible: Bool[Array, "*#batch tokens time"]) -> Array:
        """softmax over the visible keys, in float32, rounded to the model's dtype."""
        scores = scores * self.config.softmax_scale
        scores = jnp.where(visible[..., None, :], scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1).astype(self.config.dtype)

    def _attend_naive(
        self, q_nope: Array, q_pe: Array, cache: NaiveCache, visible: Array
    ) -> Float[Array, "batch tokens heads value"]:
        q = jnp.concatenate([q_nope, q_pe], axis=-1)
        probs = self._probs(einsum("bshd,bthd->bsht", q, cache.k, out=jnp.float32), visible)
        return einsum("bsht,bthv->bshv", probs, cache.v)

    def _attend_absorb(
        self, q_nope: Array, q_pe: Array, cache: AbsorbCache, visible: Array
    ) -> Float[Array, "batch tokens heads value"]:
        scores = einsum("bshc,btc->bsht", self.absorb_query(q_nope), cache.ckv, out=jnp.float32)
        scores += einsum("bshr,btr->bsht", q_pe, cache.kpe, out=jnp.float32)
        probs = self._probs(scores, visible)
        return self.expand_values(einsum("bsht,btc->bshc", probs, cache.ckv))
