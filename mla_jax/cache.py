"""Key-value caches: the paged latent cache of the decode loop, and the layer's contiguous two.

All are plain pytrees, so they pass through jit, scan and donation; none is a parameter.
"""

import dataclasses
from typing import NamedTuple, Self, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from mla_jax.config import MLAConfig, ModelConfig
from mla_jax.quantization import QuantizedPool, quantize_groups, spread_scales
from mla_jax.sharding.collectives import part_index, parts
from mla_jax.sharding.layout import check_cache, mesh_in_use, pool_spec, rows_spec
from mla_jax.sharding.mesh import CONTEXT_AXIS
from pallas_kernels.precision import FP8

LatentPool = Array | QuantizedPool


class PageView(NamedTuple):
    """Where the S new tokens of each row go, and what each row may then attend to.

    On a mesh's context axis: which of them go to this device, and which pages it has. `page_ids`
    then lists only these, in order, and `owned` says which of a row's pages they are.
    """

    page_ids: Int[Array, " ids"]
    start: Int[Array, " batch"]
    length: Int[Array, " batch"]
    positions: Int[Array, "batch tokens"]
    page: Int[Array, "batch tokens"]  # num_pages where nothing is written
    slot: Int[Array, "batch tokens"]
    owned: Bool[Array, "batch max_pages"] | None = None  # None: all

    @property
    def counts(self) -> Int[Array, " batch"]:
        """How many tokens of each row are new, and written."""
        return self.length - self.positions[:, 0]

    def held(self, tokens: Int[Array, " batch"], page_size: int) -> Int[Array, " batch"]:
        """How many of each row's first `tokens` tokens lie in the pages of `page_ids`."""
        if self.owned is None:
            return tokens
        first = jnp.arange(self.owned.shape[1], dtype=jnp.int32) * page_size
        filled = jnp.clip(tokens[:, None] - first, 0, page_size)
        return jnp.where(self.owned, filled, 0).sum(axis=1, dtype=jnp.int32)

    @property
    def row_starts(self) -> Int[Array, " batch"]:
        """Where each row's tokens begin when all rows' stand one after the other."""
        batch, tokens = self.positions.shape
        return jnp.arange(batch, dtype=jnp.int32) * tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedLatentCache:
    """A pool of pages a layer, and which of them each row of the batch owns.

    ckv[layer] is [num_pages, page_size, kv_lora_rank], the normalised latent; kpe[layer] is
    [num_pages, page_size, qk_rope_head_dim], the rotated key part. Row b's token t lies in page
    block_table[b, t // page_size], slot t % page_size; an entry below 0 is no page. A token that
    has no page is not written and its row's length stands still, so a row is paused, or ended, by
    its table alone.

    In float8_e4m3fn the latents are quantised as they are written, and ckv[layer] is a
    `QuantizedPool`; kpe stays in the model's dtype: 656 bytes a token at DeepSeek's widths.

    A model with an indexer also has index_keys[layer], [num_pages, page_size, index_head_dim]: its
    keys after the Hadamard transform, in float8_e4m3fn with a scale a token, whatever the dtype of
    the rest; another model has none.

    On a mesh, pools lie split over `data` and `context`, the table and the lengths over `data`.
    Each group of requests counts its own pages from 0, so ids go to num_pages / data - 1, and page
    i lies on the context device i % context: consecutive ids spread a row evenly.

    >>> from mla_jax import presets
    >>> cache = PagedLatentCache.create(presets["tiny"], num_pages=4, max_batch=2, max_pages=2)
    >>> cache.ckv[0].shape
    (4, 64, 64)
    """

    ckv: tuple[Float[Array, "pages page latent"] | QuantizedPool, ...]
    kpe: tuple[Float[Array, "pages page rope"], ...]
    index_keys: tuple[QuantizedPool, ...] = ()
    block_table: Int[Array, "batch max_pages"]
    lengths: Int[Array, " batch"]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int = 64,
        max_batch: int,
        max_pages: int,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """Pools of zeros, no row with a page. `max_pages`: most pages a row can own.

        dtype: None is the model's; "float8_e4m3fn" quantises the latents. mesh: where the parts
        lie, each made on its device; num_pages and max_batch count all of them. Errors: ValueError
        for a size below 1, or one that the mesh does not divide.
        """
        sizes = {
            "num_pages": num_pages,
            "page_size": page_size,
            "max_batch": max_batch,
            "max_pages": max_pages,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        dtype = jnp.dtype(dtype or config.dtype)
        fp8 = dtype == FP8
        pool_place = row_place = None
        if mesh is not None:
            check_cache(mesh, num_pages=num_pages, max_batch=max_batch)
            pool_place = NamedSharding(mesh, pool_spec(mesh))
            row_place = NamedSharding(mesh, rows_spec(mesh))

        def pool(width: int, *, fp8: bool) -> LatentPool:
            shape = (num_pages, page_size, width)
            if fp8:
                return QuantizedPool.zeros(*shape, device=pool_place)
            plain = config.dtype if dtype == FP8 else dtype
            return jnp.zeros(shape, plain, device=pool_place)

        layers, mla = range(config.n_layers), config.mla
        indexed = layers if mla.index_n_heads else ()
        return cls(
            ckv=tuple(pool(mla.kv_lora_rank, fp8=fp8) for _ in layers),
            kpe=tuple(pool(mla.qk_rope_head_dim, fp8=False) for _ in layers),  # pyright: ignore[reportArgumentType]
            index_keys=tuple(pool(mla.index_head_dim, fp8=True) for _ in indexed),  # pyright: ignore[reportArgumentType]
            block_table=jnp.full((max_batch, max_pages), -1, jnp.int32, device=row_place),
            lengths=jnp.zeros(max_batch, jnp.int32, device=row_place),
        )

    @property
    def num_pages(self) -> int:
        return self.ckv[0].shape[0]

    @property
    def page_size(self) -> int:
        return self.ckv[0].shape[1]

    @property
    def max_batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def max_length(self) -> int:
        """Most tokens a row can hold."""
        return self.block_table.shape[1] * self.page_size

    def specs(self, mesh: Mesh | AbstractMesh) -> "PagedLatentCache":
        """The layout on `mesh`, in this cache's structure."""

        pools = len(jax.tree.leaves((self.ckv, self.kpe, self.index_keys)))
        rows = rows_spec(mesh)
        return jax.tree.unflatten(
            jax.tree.structure(self), [*[pool_spec(mesh)] * pools, rows, rows]
        )

    def view(self, tokens: int, count: Int[Array, " batch"]) -> PageView:
        """Room for up to `tokens` new tokens a row, of which row b brings count[b]."""
        batch, max_pages = self.block_table.shape
        offset = jnp.arange(tokens, dtype=jnp.int32)
        positions = self.lengths[:, None] + offset
        column = positions // self.page_size
        page = jnp.take_along_axis(self.block_table, column.clip(0, max_pages - 1), axis=1)
        valid = (offset < count[:, None]) & (column < max_pages) & (page >= 0)
        # A row's first token without a page ends what is written: no holes.
        valid = jnp.cumprod(valid, axis=1, dtype=jnp.int32).astype(bool)
        table, owned, write = self.block_table, None, valid
        if (devices := parts(CONTEXT_AXIS)) > 1:
            here = part_index(CONTEXT_AXIS)
            owned = (table >= 0) & (table % devices == here)
            table = _compacted(table // devices, owned)
            write, page = valid & (page % devices == here), page // devices
        return PageView(
            page_ids=table.reshape(-1),
            start=jnp.arange(batch, dtype=jnp.int32) * max_pages,
            length=self.lengths + valid.sum(axis=1, dtype=jnp.int32),
            positions=positions,
            page=jnp.where(write, page, self.num_pages),
            slot=positions % self.page_size,
            owned=owned,
        )

    def advanced(
        self,
        view: PageView,
        ckv: tuple[LatentPool, ...],
        kpe: tuple[Array, ...],
        index_keys: tuple[QuantizedPool, ...] = (),
    ) -> "PagedLatentCache":
        """This cache after `view`'s tokens were written to the pools."""
        return dataclasses.replace(
            self, ckv=ckv, kpe=kpe, index_keys=index_keys, lengths=view.length
        )

    def with_rows(
        self, block_table: Int[Array, "batch max_pages"], lengths: Int[Array, " batch"]
    ) -> "PagedLatentCache":
        """The same pools under another table, after the allocator moved pages."""
        return dataclasses.replace(self, block_table=block_table, lengths=lengths)

    def copy_pages(self, source: Int[Array, " n"], target: Int[Array, " n"]) -> "PagedLatentCache":
        """Copy whole pages within every pool: what copy-on-write asks for.

        A target below 0 or past the pool copies nothing, so that lists can be padded.
        Errors: NotImplementedError on a mesh that splits the pools.
        """
        mesh = mesh_in_use()
        if mesh is not None and pool_spec(mesh) != PartitionSpec():
            raise NotImplementedError(
                f"copy_pages: the pools are split over {pool_spec(mesh)[0]}, expected a mesh with "
                "data=1 and context=1"
            )
        target = jnp.where(target < 0, self.num_pages, target)

        def copied(pool: Array) -> Array:
            return pool.at[target].set(pool[source], mode="drop")

        pools = self.ckv, self.kpe, self.index_keys
        ckv, kpe, index_keys = jax.tree.map(copied, pools)
        return dataclasses.replace(self, ckv=ckv, kpe=kpe, index_keys=index_keys)


def _compacted(
    ids: Int[Array, "batch max_pages"], kept: Bool[Array, "batch max_pages"]
) -> Int[Array, "batch max_pages"]:
    """Each row's `kept` ids in front, in their order."""
    batch, width = ids.shape
    place = jnp.where(kept, jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1, width)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return jnp.zeros_like(ids).at[rows, place].set(ids, mode="drop")


@overload
def write_pages(pool: Array, view: PageView, rows: Array) -> Array: ...
@overload
def write_pages(pool: QuantizedPool, view: PageView, rows: Array) -> QuantizedPool: ...
@overload
def write_pages(pool: LatentPool, view: PageView, rows: Array) -> LatentPool: ...


def write_pages(
    pool: LatentPool, view: PageView, rows: Float[Array, "batch tokens width"]
) -> LatentPool:
    """`pool` with the new tokens' rows in their slots; in place when the pool is donated."""
    if isinstance(pool, QuantizedPool):
        new = zip(pool, quantize_groups(rows), strict=True)
        return QuantizedPool(*(write_pages(array, view, part) for array, part in new))
    return pool.at[view.page, view.slot].set(rows.astype(pool.dtype), mode="drop")


def read_pages(
    pool: LatentPool, ids: Int[Array, "*ids"], dtype: DTypeLike
) -> Float[Array, "*ids page width"]:
    """Whole pages of a pool, in `dtype`."""
    if isinstance(pool, QuantizedPool):
        values, scales = pool.values[ids].astype(jnp.float32), pool.scales[ids]
        return (values * spread_scales(scales, values.shape[-1])).astype(dtype)
    return pool[ids].astype(dtype)


def pool_and_scales(pool: LatentPool) -> tuple[Array, Array | None]:
    """What the paged operations take as a pool and as its scales."""
    return (pool.values, pool.scales) if isinstance(pool, QuantizedPool) else (pool, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NaiveCache:
    """Full keys and values of a batch of sequences: [B, T, H, N+R] and [B, T, H, V]."""

    k: Float[Array, "batch time heads qk"]
    v: Float[Array, "batch time heads value"]

    @classmethod
    def create(cls, config: MLAConfig, *, batch: int, max_seq_len: int) -> Self:
        shape = (batch, max_seq_len, config.n_heads)
        return cls(
            k=jnp.zeros((*shape, config.qk_head_dim), config.dtype),
            v=jnp.zeros((*shape, config.v_head_dim), config.dtype),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsorbCache:
    """The normalised latent and the rotated key part: [B, T, C] and [B, T, R]."""

    ckv: Float[Array, "batch time latent"]
    kpe: Float[Array, "batch time rope"]

    @classmethod
    def create(cls, config: MLAConfig, *, batch: int, max_seq_len: int) -> Self:
        return cls(
            ckv=jnp.zeros((batch, max_seq_len, config.kv_lora_rank), config.dtype),
            kpe=jnp.zeros((batch, max_seq_len, config.qk_rope_head_dim), config.dtype),
        )


def append(cache: Array, rows: Array, start_pos: int | Int[Array, ""]) -> Array:
    """A contiguous cache with `rows` at start_pos along its time axis."""
    return jax.lax.dynamic_update_slice_in_dim(cache, rows.astype(cache.dtype), start_pos, axis=1)


def causal(positions: Int[Array, " tokens"], time: int) -> Bool[Array, "tokens time"]:
    """Key t is visible to the query at position p iff t <= p."""
    return jnp.arange(time) <= positions[:, None]
