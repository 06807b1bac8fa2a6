"""Text generation: chunked prefill, then blocks of decode steps that never meet the host."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from mla_jax.allocator import PageAllocator
from mla_jax.cache import PagedLatentCache
from mla_jax.config import ModelConfig
from mla_jax.nn import Decoder, decode_step, prefill
from mla_jax.sampling import Sampler
from mla_jax.sharding.layout import logits_spec, replicated, rows_together, shard_model
from mla_jax.sharding.mesh import CONTEXT_AXIS, DATA_AXIS, axis_size
from pallas_kernels.precision import FP8

BLOCK_STEPS = 32
"""Decode steps a compiled block: pages are reserved before it, tokens are read after it."""

PREFILL_CHUNK = 512
"""Most prompt tokens a row brings to one prefill call."""

KV_DTYPES = {None: None, "fp8": FP8}
"""The cache's dtype by what callers say; None is the model's."""


@functools.partial(jax.jit, static_argnames="backend", donate_argnames=("cache", "logits"))
def _prefill_chunk(
    model: Decoder,
    tokens: Int[Array, "batch tokens"],
    counts: Int[Array, " batch"],
    cache: PagedLatentCache,
    logits: Float[Array, "batch vocab"],
    *,
    backend: str | None,
) -> tuple[Float[Array, "batch vocab"], PagedLatentCache]:
    """One chunk of every row's prompt; the logits of rows that bring no token stay."""
    new_logits, cache = prefill(model, tokens, cache, counts=counts, backend=backend)
    return jnp.where((counts > 0)[:, None], new_logits, logits), cache


@functools.partial(
    jax.jit, static_argnames=("sampler", "backend", "steps"), donate_argnames="cache"
)
def decode_block(
    model: Decoder,
    tokens: Int[Array, " batch"],
    cache: PagedLatentCache,
    key: Key[Array, ""],
    *,
    sampler: Sampler,
    backend: str | None = None,
    steps: int = BLOCK_STEPS,
) -> tuple[Int[Array, "steps batch"], PagedLatentCache]:
    """`steps` decode steps in one compiled call, sampling on the device; the cache is donated.

    tokens: each row's newest token. Returns the tokens that follow, one row a step. Under
    `jax.set_mesh` it is one program on all devices, and every one of them has all the tokens.
    """

    def step(carry, key):
        tokens, cache = carry
        logits, cache = decode_step(model, tokens, cache, backend=backend)
        tokens = _sampled(sampler, logits, key)
        return (tokens, cache), tokens

    (_, cache), generated = lax.scan(step, (tokens, cache), jax.random.split(key, steps))
    return replicated(generated), cache


@functools.partial(jax.jit, static_argnames="sampler")
def _first_tokens(
    logits: Float[Array, "batch vocab"], key: Key[Array, ""], *, sampler: Sampler
) -> Int[Array, " batch"]:
    return replicated(_sampled(sampler, logits, key))


def _sampled(
    sampler: Sampler, logits: Float[Array, "batch vocab"], key: Key[Array, ""]
) -> Int[Array, " batch"]:
    # The greatest of parts is the greatest of all, but a sorted or a drawn row must be together.
    return sampler(logits if sampler.temperature == 0 else rows_together(logits), key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What one block brought. Lengths count tokens, `seconds` is since generation began."""

    tokens: list[list[int]]  # new tokens of each row, in this block
    finished: list[bool]  # rows that have met an end token or their limit
    pages_in_use: int
    num_pages: int
    seconds: float


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts: got none, expected at least one")
    checked = []
    for i, prompt in enumerate(prompts):
        tokens = [int(token) for token in prompt]
        if not tokens and config.bos_id is not None:
            tokens = [config.bos_id]
        if not tokens:
            raise ValueError(f"prompts[{i}]: got no tokens, and the model has no begin token")
        bad = next((t for t in tokens if not 0 <= t < config.vocab), None)
        if bad is not None:
            raise ValueError(f"prompts[{i}]: got token {bad}, expected 0 to {config.vocab - 1}")
        checked.append(tokens)
    return checked


class _Session:
    """The rows of one call: their pages, their cache, and the tokens they have made.

    On a mesh they are dealt out to its groups of requests, with empty rows where they do not fill
    the last; each group has an allocator for its own pages.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampler: Sampler,
        *,
        seed: int,
        backend: str | None,
        ignore_eos: bool,
        page_size: int,
        num_pages: int | None,
        mesh: Mesh | None,
        kv_dtype: str | None,
    ) -> None:
        config = model.config
        self.model, self.mesh = model if mesh is None else shard_model(model, mesh), mesh
        self.prompts, self.sampler = prompts, sampler
        self.max_new_tokens, self.backend = max_new_tokens, backend
        self.ends = frozenset() if ignore_eos else frozenset(config.eos_ids)
        self.key = jax.random.key(seed)
        self.made: list[list[int]] = [[] for _ in prompts]

        longest = max(map(len, prompts)) + max_new_tokens
        if longest > config.max_seq_len:
            raise ValueError(
                f"prompts: got {max(map(len, prompts))} tokens and {max_new_tokens} new ones, "
                f"expected at most {config.max_seq_len}, the model's longest sequence"
            )
        max_pages = -(-longest // page_size)
        groups = 1 if mesh is None else axis_size(mesh, DATA_AXIS)
        self.group_rows = -(-len(prompts) // groups)
        self.batch = groups * self.group_rows
        if num_pages is None:
            pages = [-(-(len(p) + max_new_tokens) // page_size) for p in prompts]
            starts = range(0, len(pages), self.group_rows)
            context = 1 if mesh is None else axis_size(mesh, CONTEXT_AXIS)
            most = max(sum(pages[start : start + self.group_rows]) for start in starts)
            num_pages = groups * -(-most // context) * context
        self.allocators = [
            PageAllocator(num_pages // groups, page_size=page_size, max_pages=max_pages)
            for _ in range(groups)
        ]
        # None once a row has ended and its pages are free.
        self.rows: list[int | None] = [
            self._allocator(row).allocate(len(prompt)) for row, prompt in enumerate(prompts)
        ]
        self.cache = PagedLatentCache.create(
            config,
            num_pages=num_pages,
            page_size=page_size,
            max_batch=self.batch,
            max_pages=max_pages,
            dtype=KV_DTYPES[kv_dtype],
            mesh=mesh,
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _allocator(self, row: int) -> PageAllocator:
        return self.allocators[row // self.group_rows]

    @property
    def num_pages(self) -> int:
        return sum(allocator.num_pages for allocator in self.allocators)

    @property
    def pages_in_use(self) -> int:
        return sum(allocator.num_used for allocator in self.allocators)

    def _upload_table(self) -> None:
        rows = [*self.rows, *(None for _ in range(self.batch - len(self.rows)))]
        starts = range(0, self.batch, self.group_rows)
        table = np.concatenate(
            [
                allocator.table(rows[start : start + self.group_rows])
                for allocator, start in zip(self.allocators, starts, strict=True)
            ]
        )
        place = None if self.mesh is None else self.cache.block_table.sharding
        self.cache = self.cache.with_rows(jax.device_put(table, place), self.cache.lengths)

    def prefill(self) -> np.ndarray:
        """Write every prompt to the cache; the first new token of every row."""
        self._upload_table()
        batch, longest = self.batch, max(map(len, self.prompts))
        # Widths are powers of two, so that few programs serve all prompts; the cache may be less.
        width = min(PREFILL_CHUNK, max(8, 1 << (longest - 1).bit_length()), self.cache.max_length)
        config, mesh = self.model.config, self.mesh
        place = None if mesh is None else NamedSharding(mesh, logits_spec(config, mesh))
        logits = jnp.zeros((batch, config.vocab), jnp.float32, device=place)
        for begin in range(0, longest, width):
            chunk = np.zeros((batch, width), np.int32)
            counts = np.zeros(batch, np.int32)
            for row, prompt in enumerate(self.prompts):
                part = prompt[begin : begin + width]
                chunk[row, : len(part)], counts[row] = part, len(part)
            with self._on_mesh():
                logits, self.cache = _prefill_chunk(
                    self.model, chunk, counts, self.cache, logits, backend=self.backend
                )
        self.key, key = jax.random.split(self.key)
        with self._on_mesh():
            return np.asarray(_first_tokens(logits, key, sampler=self.sampler))

    def decode(self, newest: np.ndarray) -> np.ndarray:
        """One block of steps after `newest`: tokens [steps, rows]."""
        for row, sequence in enumerate(self.rows):
            if sequence is not None:
                left = self.max_new_tokens - len(self.made[row])
                self._allocator(row).extend(sequence, min(BLOCK_STEPS, left))
        self._upload_table()
        self.key, key = jax.random.split(self.key)
        with self._on_mesh():
            generated, self.cache = decode_block(
                self.model, newest, self.cache, key, sampler=self.sampler, backend=self.backend
            )
        return np.asarray(generated)

    def take(self, generated: np.ndarray) -> list[list[int]]:
        """Keep what each row still wanted of `generated` [steps, rows]; free rows that ended."""
        taken: list[list[int]] = []
        for row, sequence in enumerate(self.rows):
            kept: list[int] = []
            if sequence is not None:
                left = self.max_new_tokens - len(self.made[row])
                for token in generated[:left, row].tolist():
                    if token in self.ends:
                        left = 0
                        break
                    kept.append(token)
                self.made[row] += kept
                if left <= len(kept):
                    self._allocator(row).free(sequence)
                    self.rows[row] = None
            taken.append(kept)
        return taken

    @property
    def done(self) -> bool:
        return all(row is None for row in self.rows)


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    ignore_eos: bool = False,
    page_size: int = 64,
    num_pages: int | None = None,
    mesh: Mesh | None = None,
    kv_dtype: str | None = None,
) -> Iterator[Progress]:
    """`generate`, a block at a time: yields the new tokens of every row as they come.

    The first yield follows prefill with one token a row; each later one follows a compiled block
    of BLOCK_STEPS steps, in which nothing passes to or from the host.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected 0 or more")
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype: got {kv_dtype!r}, expected None or 'fp8'")
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    session = _Session(
        model,
        _check_prompts(model.config, prompts),
        max_new_tokens,
        sampler,
        seed=seed,
        backend=backend,
        ignore_eos=ignore_eos,
        page_size=page_size,
        num_pages=num_pages,
        mesh=mesh,
        kv_dtype=kv_dtype,
    )
    begin = time.perf_counter()
    if max_new_tokens == 0:
        return
    newest = session.prefill()
    generated = newest[None]
    while True:
        pages_in_use = session.pages_in_use
        yield Progress(
            tokens=session.take(generated),
            finished=[row is None for row in session.rows],
            pages_in_use=pages_in_use,
            num_pages=session.num_pages,
            seconds=time.perf_counter() - begin,
        )
        if session.done:
            return
        generated = session.decode(newest)
        newest = generated[-1]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    ignore_eos: bool = False,
    page_size: int = 64,
    num_pages: int | None = None,
    mesh: Mesh | None = None,
    kv_dtype: str | None = None,
) -> list[list[int]]:
    """The new tokens that follow each prompt, without the prompt and without the end token.

    prompts: token ids, of any lengths; an empty one begins with the model's begin token.
    temperature 0 is greedy; see `Sampler` for top_k and top_p. A row stops at one of the config's
    end tokens, unless `ignore_eos`. `num_pages` bounds the cache: None takes what the prompts and
    max_new_tokens can fill. backend: None picks the fastest that can run the decode kernels.
    mesh: one from `sharding.make_mesh`; prompts are dealt out over `data`, each part with an equal
    share of the pages, and a model that does not lie on the mesh yet is put there.
    kv_dtype: "fp8" keeps the latent cache in float8_e4m3fn, None in the model's dtype;
    `logit_shift` tells what that does to the logits.
    Errors: ValueError for an argument out of range; OutOfPagesError when the cache is full;
    NotImplementedError for a backend that cannot run the model.

    >>> from flax import nnx
    >>> from mla_jax import presets
    >>> model = Decoder(presets["tiny"], rngs=nnx.Rngs(0))
    >>> [len(row) for row in generate(model, [[1, 2], [3]], max_new_tokens=3, ignore_eos=True)]
    [3, 3]
    """
    made: list[list[int]] = [[] for _ in prompts]
    for progress in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        backend=backend,
        ignore_eos=ignore_eos,
        page_size=page_size,
        num_pages=num_pages,
        mesh=mesh,
        kv_dtype=kv_dtype,
    ):
        for row, tokens in zip(made, progress.tokens, strict=True):
            row += tokens
    return made
