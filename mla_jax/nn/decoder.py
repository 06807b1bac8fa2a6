"""The decoder, and the two functions that a decode loop is written with."""

import dataclasses
from typing import overload

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mla_jax.cache import LatentPool, PagedLatentCache, PageView
from mla_jax.config import ModelConfig
from mla_jax.decode_plan import BACKEND, DecodePlan, check_plan
from mla_jax.nn.feed_forward import FeedForward, MoE
from mla_jax.nn.linear import einsum, normal_param
from mla_jax.nn.mla import MLA, Rotation
from mla_jax.nn.norm import RMSNorm
from mla_jax.nn.scheduled import scheduled_attention
from mla_jax.quantization import QuantizedPool
from mla_jax.rope import rotation
from mla_jax.sharding.layout import on_shards
from mla_jax.sharding.mesh import MODEL_AXIS
from pallas_kernels.backend import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Which backend runs the kernels of a step: None takes the fastest that can."""

    backend: str | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        check_name(self.backend)

    @property
    def besides_attention(self) -> str | None:
        """The backend of other kernels than attention's, which alone have a schedule."""
        return None if self.backend == BACKEND else self.backend


class DecoderLayer(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs) -> None:
        dim, dtype = config.mla.dim, config.dtype
        self.attn_norm = RMSNorm(dim, dtype, eps=config.norm_eps)
        self.attn = MLA(config.mla, rngs=rngs)
        self.ffn_norm = RMSNorm(dim, dtype, eps=config.norm_eps)
        if config.moe is not None and config.is_moe(index):
            self.ffn = MoE(config.moe, dim, dtype, rngs=rngs)
        else:
            self.ffn = FeedForward(dim, config.inter_dim, dtype, rngs=rngs)

    def feed_forward(self, x: Array, kernels: KernelChoice) -> Array:
        hidden = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            backend = kernels.besides_attention
            return x + self.ffn(hidden, backend=backend, interpret=kernels.interpret)
        return x + self.ffn(hidden)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        x = x + self.attn(self.attn_norm(x), attn_impl="naive")
        return self.feed_forward(x, KernelChoice(backend="reference"))

    def attend(
        self,
        x: Float[Array, "batch tokens dim"],
        ckv_pool: LatentPool,
        kpe_pool: Array,
        index_pool: QuantizedPool | None,
        view: PageView,
        rope: Rotation,
        kernels: KernelChoice,
        plan: DecodePlan | None = None,
    ) -> tuple[Array, LatentPool, Array, QuantizedPool | None, DecodePlan | None]:
        """(x + attention, the pools with this call's tokens, plan): the layer's first half."""
        hidden, indices = self.attn_norm(x), None
        if self.attn.indexer is not None and index_pool is not None:
            q_lora = self.attn.query_latent(hidden)
            indices, index_pool = self.attn.indexer.paged(hidden, q_lora, index_pool, view, rope)
        args = (hidden, ckv_pool, kpe_pool, view, rope)
        choice = {"backend": kernels.backend, "interpret": kernels.interpret}
        if plan is None:
            attended, ckv_pool, kpe_pool = self.attn.paged(*args, indices=indices, **choice)
        else:
            attended, ckv_pool, kpe_pool, plan = scheduled_attention(
                self.attn, *args, plan, **choice
            )
        return x + attended, ckv_pool, kpe_pool, index_pool, plan


class Decoder(nnx.Module):
    """A DeepSeek-style language model.

    decoder(tokens [B, S] int32) -> logits [B, S, vocab] float32, over whole sequences without a
    cache: the differentiable path, for training and for checking (an indexer's choice has no
    gradient). `prefill` and `decode_step` run the same weights over a paged cache.

    >>> from flax import nnx
    >>> from mla_jax import presets
    >>> Decoder(presets["tiny"], rngs=nnx.Rngs(0))(jnp.zeros((1, 4), jnp.int32)).shape
    (1, 4, 256)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        dim, dtype = config.mla.dim, config.dtype
        self.config = config
        self.embed = normal_param((config.vocab, dim), dtype, rngs, (None, None))
        self.layers = nnx.List([DecoderLayer(config, i, rngs=rngs) for i in range(config.n_layers)])
        self.norm = RMSNorm(dim, dtype, eps=config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else normal_param((config.vocab, dim), dtype, rngs, (MODEL_AXIS, None))
        )

    def __call__(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocab"]:
        x = self.embed[...][tokens]
        for layer in self.layers:
            x = layer(x)
        return self.logits(x)

    def logits(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        head = self.embed if self.head is None else self.head
        return einsum("...d,vd->...v", self.norm(x), head[...], out=jnp.float32)

    def paged(
        self,
        tokens: Int[Array, "batch tokens"],
        cache: PagedLatentCache,
        view: PageView,
        kernels: KernelChoice,
        plan: DecodePlan | None = None,
    ) -> tuple[Float[Array, "batch tokens dim"], PagedLatentCache, DecodePlan | None]:
        """Hidden states of `tokens`, which are written to the cache where `view` says.

        One token a row is attended to as `plan` says, if there is one.
        """
        if len(cache.ckv) != len(self.layers):
            raise ValueError(
                f"cache: got {len(cache.ckv)} layers, expected the model's {len(self.layers)}"
            )
        indexed = self.config.mla.index_n_heads > 0
        if indexed != bool(cache.index_keys):
            had, wanted = ("no", "one") if indexed else ("an", "none")
            raise ValueError(f"cache: got {had} indexer's keys, expected {wanted}, by the model")
        if tokens.shape[0] != cache.max_batch:
            raise ValueError(f"tokens: got {tokens.shape[0]} rows, expected {cache.max_batch=}")
        x = self.embed[...][tokens]
        rope = rotation(self.config.mla, view.positions)
        ckv, kpe, index_keys = list(cache.ckv), list(cache.kpe), list(cache.index_keys)
        for i, layer in enumerate(self.layers):
            index_pool = index_keys[i] if index_keys else None
            pools = ckv[i], kpe[i], index_pool
            x, ckv[i], kpe[i], index_pool, plan = layer.attend(x, *pools, view, rope, kernels, plan)
            x = layer.feed_forward(x, kernels)
            if index_pool is not None:
                index_keys[i] = index_pool
        return x, cache.advanced(view, tuple(ckv), tuple(kpe), tuple(index_keys)), plan


def prefill(
    model: Decoder,
    tokens: Int[Array, "batch tokens"],
    cache: PagedLatentCache,
    *,
    counts: Int[Array, " batch"] | None = None,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch vocab"], PagedLatentCache]:
    """Append a chunk of each row's prompt to the cache; logits after each row's last token.

    tokens: int32, padded on the right; row b brings counts[b] of them (None: all S), at the
    positions after those it already has, so long prompts can come in chunks. A row that brings
    none is left as it is, and its logits mean nothing. Pages must be in the block table first.
    Few tokens attend in the latent space, many with full keys and values (`MLA.expands`), whichever
    is less arithmetic; with an indexer, to the cached tokens that it chooses, in the latent space,
    where the block table has room for more than index_topk. Jit with the cache donated. Errors:
    ValueError for shapes that do not match the cache, NotImplementedError for a backend that cannot
    run the model.

    Under `jax.set_mesh`, with a model and a cache made for the mesh, one program runs on all of
    its devices; the logits then lie split over the vocabulary.

    >>> from flax import nnx
    >>> from mla_jax import presets
    >>> model = Decoder(presets["tiny"], rngs=nnx.Rngs(0))
    >>> cache = PagedLatentCache.create(model.config, num_pages=2, max_batch=2, max_pages=1)
    >>> cache = cache.with_rows(jnp.array([[1], [0]]), cache.lengths)
    >>> logits, cache = prefill(model, jnp.ones((2, 3), jnp.int32), cache, counts=jnp.array([3, 1]))
    >>> logits.shape, cache.lengths.tolist()
    ((2, 256), [3, 1])
    """
    batch, width = tokens.shape
    if width > cache.max_length:
        raise ValueError(f"tokens: got {width} a row, the cache holds {cache.max_length}")
    if counts is None:
        counts = jnp.full(batch, width, jnp.int32)
    kernels = KernelChoice(backend=backend, interpret=interpret)

    def step(model: Decoder, cache: PagedLatentCache, tokens: Array, counts: Array):
        x, cache, _ = model.paged(tokens, cache, cache.view(width, counts), kernels)
        last = jnp.clip(counts - 1, 0, width - 1)
        return model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), cache

    return on_shards(step, model, cache, tokens, counts)


@overload
def decode_step(
    model: Decoder,
    tokens: Array,
    cache: PagedLatentCache,
    plan: None = None,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Array, PagedLatentCache]: ...
@overload
def decode_step(
    model: Decoder,
    tokens: Array,
    cache: PagedLatentCache,
    plan: DecodePlan,
    *,
    backend: str | None = None,
    interpret: bool = False,
) -> tuple[Array, PagedLatentCache, DecodePlan]: ...


def decode_step(
    model: Decoder,
    tokens: Int[Array, " batch"],
    cache: PagedLatentCache,
    plan: DecodePlan | None = None,
    *,
    backend: str | None = None,
    interpret: bool = False,
):
    """Append one token to every row: (the logits [batch, vocab] of the next one, the cache).

    A row whose next position has no page is left as it is, and its logits mean nothing. Jit with
    the cache donated, or call inside `jax.lax.scan`; nothing depends on the lengths but values.
    Meshes and errors: as `prefill`.

    plan: attention goes by its schedule (`megakernel.plan_decode`), in all layers, and it comes
    back as a third result for the next step; after many steps `megakernel.check_signals` says
    whether all launches found what they waited for. `backend` is then the schedule's, "megakernel"
    that of one launch, beside which the other kernels are the fastest that can run. A row that has
    outgrown the plan gives NaN. Errors: NotImplementedError for a model, cache or mesh that a
    schedule cannot serve, ValueError for another batch's plan or for that backend without one.

    >>> from flax import nnx
    >>> from mla_jax import presets
    >>> model = Decoder(presets["tiny"], rngs=nnx.Rngs(0))
    >>> cache = PagedLatentCache.create(model.config, num_pages=1, max_batch=1, max_pages=1)
    >>> cache = cache.with_rows(jnp.array([[0]]), cache.lengths)
    >>> logits, cache = decode_step(model, jnp.array([7]), cache)
    >>> logits.shape, cache.lengths.tolist()
    ((1, 256), [1])
    """
    kernels = KernelChoice(backend=backend, interpret=interpret)

    def run(model: Decoder, cache: PagedLatentCache, tokens: Array, plan: DecodePlan | None):
        view = cache.view(1, jnp.ones_like(cache.lengths))
        x, cache, plan = model.paged(tokens[:, None], cache, view, kernels, plan)
        return model.logits(x[:, 0]), cache, plan

    if plan is not None:
        check_plan(plan, model.config, cache)  # also that no mesh is set
        return run(model, cache, tokens, plan)
    if backend == BACKEND:
        raise ValueError(
            f"plan: got None with backend {BACKEND!r}, expected one of megakernel.plan_decode"
        )

    def step(model: Decoder, cache: PagedLatentCache, tokens: Array):
        return run(model, cache, tokens, None)[:2]

    return on_shards(step, model, cache, tokens)
