# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # Paged attention, every function and every backend, against NumPy
#
# Each public function of `mla_jax` that attends over pages, or over ragged keys without them, runs
# here on every backend that it has: `reference` as it is, the Pallas kernels interpreted, which
# executes their Python on a machine without a GPU. The yardstick is one dense attention in NumPy
# and float64, a few lines that know nothing of pages: the cells gather the tokens for it.
#
# Memory that no request owns holds NaN, so that a kernel which reads it shows.

# %%
import os

os.environ.setdefault("NPROC", "16")  # the interpreter of Mosaic GPU blocks a thread a warpgroup

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax
from mla_jax import flash_mla, megakernel
from pallas_kernels.backend import KNOWN

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
rng = np.random.default_rng(SEED)
print("seed", SEED, "jax", jax.__version__)

# %% [markdown]
# ## The yardstick
#
# The last of `n` queries sees all `m` keys, the one before it all but one. Queries that see nothing
# give 0, and −∞ as the logarithm (to base 2) of their sum of exponentials.


# %%
def attend(q, k, v, scale, causal=True, visible=None):
    """q [n, heads, width], k [m, heads or 1, width], v like k -> (out [n, heads, V], lse)."""
    n, m = len(q), len(k)
    k, v = (np.broadcast_to(x, (m, q.shape[1], x.shape[2])) for x in (k, v))
    scores = np.einsum("nhd,mhd->nhm", q, k) * scale
    seen = np.arange(m) <= np.arange(m - n, m)[:, None] if causal else np.ones((n, m), bool)
    if visible is not None:
        seen = seen & visible
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e30)
    powers = np.exp(scores - top)
    total = powers.sum(axis=-1, keepdims=True)
    out = np.einsum("nhm,mhv->nhv", powers / np.where(total > 0, total, 1), v)
    with np.errstate(divide="ignore"):
        return out, ((np.log(total) + top) / np.log(2))[..., 0]


def f64(array):
    return np.asarray(array).astype(np.float64)


def normal(*shape):
    return rng.standard_normal(shape)


LIMITS = {"float32": 3e-5, "bfloat16": 2e-2}
errors = {}


def check(function, backend, dtype, got, want):
    """The largest deviation of finite values; what is not finite has to agree exactly."""
    worst = 0.0
    for mine, exact in zip(got, want, strict=True):
        mine = f64(mine)
        assert mine.shape == exact.shape, f"{function} on {backend}: {mine.shape}, {exact.shape}"
        finite = np.isfinite(exact)
        assert np.array_equal(mine[~finite], exact[~finite]), f"{function} on {backend}"
        assert np.isfinite(mine[finite]).all(), f"{function} on {backend}: not finite"
        worst = max(worst, np.abs(mine[finite] - exact[finite]).max(initial=0))
    assert worst <= LIMITS[dtype], f"{function} on {backend}, {dtype}: deviates by {worst:.1e}"
    errors[function, backend] = worst


def every_backend(function, call, want):
    """call(dtype, **options) -> outputs, and want(dtype) -> the same in float64."""
    for backend in KNOWN:
        # Tensor cores, which Mosaic GPU kernels are written for, take no float32.
        dtype = "bfloat16" if backend == "mosaic_gpu" else "float32"
        options = {"backend": backend, "interpret": backend != "reference"}
        try:
            got = call(dtype, **options)
        except NotImplementedError as reason:
            print(f"{function}: {reason}")
            continue
        check(function, backend, dtype, got, want(dtype))


def rounded(dtype, *arrays):
    """The arrays as a kernel gets them, and what they then are."""
    cast = [jnp.asarray(array, dtype) for array in arrays]
    return cast, [f64(array) for array in cast]


# %% [markdown]
# ## `mla_paged_decode` and `mla_paged_prefill`
#
# Requests of no key, one, a full page and a page and a bit; their pages lie anywhere in a pool
# whose unused slots are NaN, and two of them share a page. On the last page scores are large, so
# that what was summed before it must be scaled down.

# %%
LATENT, ROPE, PAGE, HEADS = 512, 64, 64, 4
SCALE = 192**-0.5
lengths = [0, 1, PAGE, PAGE + int(rng.integers(1, PAGE))]
pages = [[], [6], [2], [2, 4]]
pools = np.full((8, PAGE, LATENT + ROPE), np.nan)
for listed, length in zip(pages, lengths, strict=True):
    for i, page in enumerate(listed):
        pools[page, : min(length - i * PAGE, PAGE)] = normal(
            min(length - i * PAGE, PAGE), LATENT + ROPE
        )
pools[4, :, LATENT:] *= 8
kv_indptr = jnp.asarray(np.cumsum([0, *map(len, pages)]), jnp.int32)
# The ids of nobody, behind the end, may be anything.
kv_indices = jnp.asarray([*sum(pages, []), -5, 10**6], jnp.int32)
last = jnp.asarray([(length - 1) % PAGE + 1 if length else 0 for length in lengths], jnp.int32)


def tokens_of(request, pool):
    """What request `request` has cached: [length, 1, width]."""
    return pool[pages[request]].reshape(-1, pool.shape[-1])[: lengths[request], None]


def dense(q, counts, pool):
    """Every request's last counts[b] positions, one after the other."""
    parts = []
    rows = np.split(q, np.cumsum(counts)[:-1])
    for request, queries in enumerate(rows):
        keys = tokens_of(request, pool)
        parts.append(attend(queries, keys, keys[..., :LATENT], SCALE))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


q_decode = normal(len(lengths), 2, HEADS, LATENT + ROPE)


def split(array):
    return array[..., :LATENT], array[..., LATENT:]


for tokens in (1, 2):
    queries = q_decode[:, :tokens]

    def decode(dtype, queries=queries, **options):
        (q, pool), _ = rounded(dtype, queries, pools)
        csr = {"kv_last_page_len": last, **options}
        return mla_jax.mla_paged_decode(*split(q), *split(pool), kv_indptr, kv_indices, **csr)

    def decode_exactly(dtype, queries=queries, tokens=tokens):
        _, (q, pool) = rounded(dtype, queries, pools)
        out, lse = dense(q.reshape(-1, *q.shape[2:]), [tokens] * len(lengths), pool)
        return out.reshape(*q.shape[:3], LATENT), lse.reshape(q.shape[:3])

    every_backend(f"mla_paged_decode, {tokens} tokens", decode, decode_exactly)

# %%
counts = [3, 2, 5, int(rng.integers(1, PAGE))]  # of the first two some or all see no key
q_prefill = normal(sum(counts) + 2, HEADS, LATENT + ROPE)  # two rows of padding
qo_indptr = jnp.asarray(np.cumsum([0, *counts]), jnp.int32)


def prefill(dtype, **options):
    (q, pool), _ = rounded(dtype, q_prefill, pools)
    csr = {"kv_last_page_len": last, **options}
    return mla_jax.mla_paged_prefill(
        *split(q), *split(pool), qo_indptr, kv_indptr, kv_indices, **csr
    )


def prefill_exactly(dtype):
    _, (q, pool) = rounded(dtype, q_prefill, pools)
    out, lse = dense(q[: sum(counts)], counts, pool)
    padding = [(0, 2), (0, 0)]
    return np.pad(out, [*padding, (0, 0)]), np.pad(lse, padding, constant_values=-np.inf)


every_backend("mla_paged_prefill", prefill, prefill_exactly)

# %% [markdown]
# ## `mla_ragged_prefill`
#
# Keys and values of every head, without a cache; the second request has more keys than queries.

# %%
n_rows, m_rows = [5, 40], [5, 70]
ragged = normal(45, HEADS, 192), normal(75, HEADS, 192), normal(75, HEADS, 128)
ragged_indptr = [jnp.asarray(np.cumsum([0, *rows]), jnp.int32) for rows in (n_rows, m_rows)]


def ragged_prefill(dtype, **options):
    cast, _ = rounded(dtype, *ragged)
    return mla_jax.mla_ragged_prefill(*cast, *ragged_indptr, **options)


def ragged_exactly(dtype):
    _, (q, k, v) = rounded(dtype, *ragged)
    requests = zip(np.split(q, [5]), np.split(k, [5]), np.split(v, [5]), strict=True)
    parts = [attend(*request, SCALE) for request in requests]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


every_backend("mla_ragged_prefill", ragged_prefill, ragged_exactly)

# %% [markdown]
# ## FlashMLA's functions
#
# Grouped query heads over blocks that belong to a batch row; and the library's own form, whose
# single key head carries latent and rope in one array.

# %%
HEADS_Q, HEADS_KV, WIDTH, BLOCKS, PROMPT = 4, 2, 64, 3, 100
table = np.stack([rng.permutation(BLOCKS) for _ in range(2)]).astype(np.int32)
seq_lens = np.array([int(rng.integers(1, 64)), 130], np.int32)
caches = [normal(2, HEADS_KV, BLOCKS, 64, WIDTH) for _ in range(2)]
q_one, q_all = normal(2, HEADS_Q, 1, WIDTH), normal(2, HEADS_Q, PROMPT, WIDTH)
layout = rng.random((2, 2)) < 0.6
layout[0, 0] = layout[1, 0] = True


def logical(cache, row, count):
    """Tokens in order, a key head repeated for its group: [count, HEADS_Q, width]."""
    ordered = cache[row][:, table[row]].reshape(HEADS_KV, -1, WIDTH)[:, :count]
    return np.repeat(ordered, HEADS_Q // HEADS_KV, axis=0).swapaxes(0, 1)


def grouped_exactly(queries, counts, **options):
    """queries [B, heads, n, width] over each row's first counts[row] tokens."""

    def exactly(dtype):
        _, (q, k, v) = rounded(dtype, queries, *caches)
        rows = [
            attend(q[b].swapaxes(0, 1), logical(k, b, n), logical(v, b, n), WIDTH**-0.5, **options)
            for b, n in enumerate(counts)
        ]
        return [np.stack([out.swapaxes(0, 1) for out, _ in rows])]

    return exactly


def with_kvcache(dtype, **options):
    (q, k, v), _ = rounded(dtype, q_one, *caches)
    metadata = flash_mla.get_mla_metadata(q.shape, k.shape, table, seq_lens)
    return [flash_mla.flash_mla_with_kvcache(q, k, v, table, seq_lens, None, metadata, **options)]


def flash_prefill(dtype, **options):
    (q, k, v), _ = rounded(dtype, q_all, *caches)
    # The prompts' keys in order, as this function takes them: [B, HEADS_KV, PROMPT, width].
    k, v = (
        jnp.stack([x[b][:, table[b]].reshape(HEADS_KV, -1, WIDTH)[:, :PROMPT] for b in range(2)])
        for x in (k, v)
    )
    return [flash_mla.flash_mla_prefill(q, k, v, jnp.asarray(layout), **options)]


def mha(dtype, **options):
    (q, k, v), _ = rounded(dtype, q_all, *caches)
    return [flash_mla.mha_fwd_kvcache(q, k, v, jnp.asarray(table), **options)]


allowed = np.kron(layout, np.ones((64, 64), bool))[:PROMPT, :PROMPT]
every_backend("flash_mla_with_kvcache", with_kvcache, grouped_exactly(q_one, seq_lens))
every_backend(
    "flash_mla_prefill", flash_prefill, grouped_exactly(q_all, [PROMPT] * 2, visible=allowed)
)
every_backend("mha_fwd_kvcache", mha, grouped_exactly(q_all, [PROMPT] * 2))

# %%
q_pool = normal(2, 2, HEADS, LATENT + ROPE)
pool_table = np.array([[7, 1, -3], [4, 7, 2]], np.int32)  # block 7 is shared
pool_lens = np.array([70, 130], np.int32)
shared_pool = normal(8, 64, 1, LATENT + ROPE)


def pool_form(dtype, **options):
    (q, pool), _ = rounded(dtype, q_pool, shared_pool)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, pool, block_table=pool_table, seq_lens=pool_lens, causal=True, **options
    )
    return out, lse.swapaxes(1, 2) / np.log(2)  # natural logarithm, heads first


def pool_exactly(dtype):
    _, (q, pool) = rounded(dtype, q_pool, shared_pool)
    rows = []
    for queries, ids, length in zip(q, pool_table, pool_lens, strict=True):
        keys = pool[ids[: -(-length // 64)]].reshape(-1, 1, LATENT + ROPE)[:length]
        rows.append(attend(queries, keys, keys[..., :LATENT], (LATENT + ROPE) ** -0.5))
    return [np.stack(column) for column in zip(*rows, strict=True)]


every_backend("flash_mla_with_kvcache, pool", pool_form, pool_exactly)

# %% [markdown]
# ## The megakernel
#
# Sixteen heads, pages of 256 tokens, and a schedule that cuts the longer sequence into partials and
# merges them in a tree.

# %%
mega_lengths, mega_tokens, mega_page = [700, 40], 2, 256
mega_table = jnp.asarray([[4, 0, 2], [3, 9, -1]], jnp.int32)
mega_pool = np.full((5, mega_page, ROPE + LATENT), np.nan)
for row, length in zip(np.asarray(mega_table), mega_lengths, strict=True):
    for i, page in enumerate(row[: -(-length // mega_page)]):
        used = min(length - i * mega_page, mega_page)
        mega_pool[page, :used] = normal(used, ROPE + LATENT)
mega_q = normal(2, mega_tokens, 16, ROPE + LATENT)
plan = megakernel.schedule(mega_lengths, mega_tokens, num_processors=8)
ops = [event.op for event in plan.timeline()]
assert ops.count("reduction") > 0
print(f"{ops.count('partial')} partials, {ops.count('reduction')} reductions")


def mega(dtype, **options):
    (q, pool), _ = rounded(dtype, mega_q, mega_pool)
    parts = (q[..., :ROPE], q[..., ROPE:], pool[..., :ROPE], pool[..., ROPE:])
    return [megakernel.mla_decode(plan, *parts, mega_table, SCALE, **options)]


def mega_exactly(dtype):
    _, (q, pool) = rounded(dtype, mega_q, mega_pool)
    rows = []
    for queries, ids, length in zip(q, np.asarray(mega_table), mega_lengths, strict=True):
        keys = pool[ids[: -(-length // mega_page)]].reshape(-1, 1, ROPE + LATENT)[:length]
        rows.append(attend(queries, keys, keys[..., ROPE:], SCALE)[0])
    return [np.stack(rows)]


every_backend("megakernel.mla_decode", mega, mega_exactly)

# %% [markdown]
# ## What ran
#
# The largest deviation of any output or log-sum-exp: float32 but for `mosaic_gpu`, whose bfloat16
# weights carry eight bits.

# %%
functions = list(dict.fromkeys(function for function, _ in errors))
print(f"{'':32}" + "".join(f"{backend:>12}" for backend in KNOWN))
for function in functions:
    cells = (errors.get((function, backend)) for backend in KNOWN)
    print(
        f"{function:32}" + "".join(f"{'–' if e is None else format(e, '.1e'):>12}" for e in cells)
    )

assert len(functions) == 9
for function in functions:
    assert {"reference", "triton"} <= {b for f, b in errors if f == function}, function
runs_mosaic = jax.__version_info__ >= (0, 11)
for function in functions[:2]:
    assert ((function, "mosaic_gpu") in errors) == runs_mosaic, function
