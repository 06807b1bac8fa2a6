# ---
# jupyter: {kernelspec: {display_name: Python 3, language: python, name: python3}}
# ---

# %% [markdown]
# # The paged latent cache
#
# A cache is a pool of pages. A row of the batch owns some of them, in any order, and its *block
# table* lists which. `PageAllocator`, on the host, hands pages out; `PagedLatentCache`, on the
# device, is the pools and the table. Rows can share pages: a common prompt is cached once, and the
# first row that writes into a shared page gets a copy of it.
#
# The shipped model decodes here through all of that; what comes out is compared with the same model
# without any cache, and attention over shared pages with NumPy in float64.

# %%
import functools
import os
from importlib.resources import files

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mla_jax

SEED = int(os.environ.get("MLA_JAX_SEED", np.random.SeedSequence().entropy % 2**31))
rng = np.random.default_rng(SEED)
print("seed", SEED)
PAGE, PAGES, MAX_PAGES = 8, 14, 5
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]

# %% [markdown]
# ## Pages, drawn
#
# A square is a page of eight tokens; its colours are those of the rows that own it.


# %%
def draw(allocator, rows, title):
    _, axes = plt.subplots(figsize=(8, 1.1), layout="constrained")
    owners = {page: [] for page in range(allocator.num_pages)}
    for name, row in rows.items():
        for page in allocator.pages(row):
            owners[page].append(name)
    for page, names in owners.items():
        axes.add_patch(plt.Rectangle((page, 0), 0.92, 1, fill=False, color="grey"))
        for i, name in enumerate(names):
            colour = COLOURS[list(rows).index(name)]
            axes.add_patch(
                plt.Rectangle((page, i / len(names)), 0.92, 1 / len(names), color=colour)
            )
        axes.text(page + 0.46, 0.5, "+".join(names) or "free", ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.1, allocator.num_pages), ylim=(-0.1, 1.1), title=title)
    axes.axis("off")
    # What is drawn is what the allocator counts.
    assert allocator.num_used == sum(bool(names) for names in owners.values())
    plt.show()


allocator = mla_jax.PageAllocator(num_pages=PAGES, page_size=PAGE, max_pages=MAX_PAGES)
PROMPT = 19
rows = {"A": allocator.allocate(PROMPT), "B": allocator.allocate(6)}
assert [len(allocator.pages(row)) for row in rows.values()] == [3, 1]
draw(allocator, rows, "A has 19 tokens, B six")

# %% [markdown]
# C begins as A does: it shares all of A's pages and takes none. D shares A's first ten tokens.

# %%
rows["C"] = allocator.fork(rows["A"])
rows["D"] = allocator.fork(rows["A"], 10)
assert allocator.num_used == 4
assert allocator.pages(rows["D"]) == allocator.pages(rows["A"])[:2]
draw(allocator, rows, "C and D share A's pages")

# %% [markdown]
# Before new tokens are written, `extend` makes room. A row's last page is half full and shared:
# each sharer but the last to come gets a page of its own, and the pairs (from, to) say which pages
# to copy on the device. B gives its page back.

# %%
NEW = 12
copies = [pair for name in "ACD" for pair in allocator.extend(rows[name], NEW)]
allocator.free(rows.pop("B"))
print("copies:", copies)
assert len(copies) == 2, "A and D write into a shared page; C is alone in its own by then"
draw(allocator, rows, "after room for 12 more tokens each")

# %%
table = allocator.table(list(rows.values()), MAX_PAGES)
_, axes = plt.subplots(figsize=(5, 1.6), layout="constrained")
axes.imshow(np.where(table < 0, np.nan, table), cmap="Blues", aspect="auto", vmax=2 * PAGES)
for (row, column), page in np.ndenumerate(table):
    axes.text(column, row, "–" if page < 0 else page, ha="center", va="center")
axes.set_yticks(range(len(rows)), list(rows))
axes.set(xlabel="tokens 8 i to 8 i + 7 of the row", title="the block table")
plt.show()

# %% [markdown]
# ## On the device
#
# One prefill of A's prompt fills the pages that all three share. Then the pages to copy are copied,
# the table is set for three rows, and each continues with tokens of its own.

# %%
model = mla_jax.load_checkpoint(files("mla_jax") / "models" / "tiny", dtype="float32")
whole = jax.jit(lambda model, tokens: model(tokens))
step = jax.jit(mla_jax.decode_step, donate_argnums=2)
fill = jax.jit(mla_jax.prefill, donate_argnums=2)
prompt = rng.integers(1, 256, PROMPT)
pool = {"num_pages": PAGES, "page_size": PAGE, "max_pages": MAX_PAGES}
cache = mla_jax.PagedLatentCache.create(model.config, max_batch=3, **pool)
# As it was before the rows parted: A's pages, in the first row; the others bring nothing.
shared = mla_jax.PageAllocator(num_pages=PAGES, page_size=PAGE, max_pages=MAX_PAGES)
first = shared.allocate(PROMPT)
cache = cache.with_rows(jnp.asarray(shared.table([first, None, None])), cache.lengths)
padded = jnp.asarray(np.broadcast_to(prompt, (3, PROMPT)), jnp.int32)
_, cache = fill(model, padded, cache, counts=jnp.array([PROMPT, 0, 0]))

sources, targets = (jnp.asarray(ids, jnp.int32) for ids in zip(*copies, strict=True))
cache = cache.copy_pages(sources, targets)
starts = np.array([PROMPT, PROMPT, 10], np.int32)
cache = cache.with_rows(jnp.asarray(table), jnp.asarray(starts))

texts = [prompt[:start].tolist() for start in starts]
worst = 0.0
for _ in range(NEW):
    tokens = rng.integers(1, 256, 3)
    for text, token in zip(texts, tokens.tolist(), strict=True):
        text.append(token)
    logits, cache = step(model, jnp.asarray(tokens, jnp.int32), cache)
lengths = [len(text) for text in texts]
assert cache.lengths.tolist() == lengths
for name, text, row in zip(rows, texts, logits, strict=True):
    longest = np.pad(text, (0, PROMPT + NEW - len(text)))  # causal: what follows changes nothing
    want = whole(model, jnp.asarray([longest], jnp.int32))[0, len(text) - 1]
    error = float(jnp.abs(row - want).max())
    print(f"{name}: {len(text)} tokens, logits within {error:.1e} of the model without a cache")
    assert error < 2e-4, name

# %% [markdown]
# ## Attention over shared pages
#
# All pages of layer 0 as they lie on the device: A and C share two full pages, D one of these. A
# query for each row over its own pages, against NumPy over the tokens in order.

# %%
ckv, kpe = cache.ckv[0], cache.kpe[0]
latent, rope, heads = ckv.shape[-1], kpe.shape[-1], 4
q = rng.standard_normal((3, heads, latent + rope)).astype(np.float32)
counts = [len(allocator.pages(row)) for row in rows.values()]
indptr = jnp.asarray(np.cumsum([0, *counts]), jnp.int32)
indices = jnp.asarray(sum((allocator.pages(row) for row in rows.values()), []), jnp.int32)
last = jnp.asarray([(n - 1) % PAGE + 1 for n in lengths], jnp.int32)
attend = functools.partial(mla_jax.mla_paged_decode, sm_scale=0.125)
queries = jnp.asarray(q[..., :latent]), jnp.asarray(q[..., latent:])
out, lse = attend(*queries, ckv, kpe, indptr, indices, kv_last_page_len=last)


def dense(q, keys):
    scores = q @ keys.T * 0.125
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers @ keys[:, :latent] / powers.sum(axis=-1, keepdims=True)


every_page = np.concatenate([ckv, kpe], axis=-1).astype(np.float64)
exact = np.stack(
    [
        dense(q[i], every_page[allocator.pages(row)].reshape(-1, latent + rope)[:n])
        for i, (row, n) in enumerate(zip(rows.values(), lengths, strict=True))
    ]
)
error = np.abs(np.asarray(out) - exact).max()
print(f"mla_paged_decode deviates by {error:.1e}")
assert error < 1e-4

# %% [markdown]
# A prefix that all rows share need not be read once a row: its part of the attention is computed
# for all rows at once, as if their heads were those of one request, and merged with each row's own
# part by the logarithm of the sum of exponentials.

# %%
common = allocator.pages(rows["D"])[:1]
assert all(allocator.pages(row)[:1] == common for row in rows.values())
one = tuple(x.reshape(1, -1, x.shape[-1]) for x in queries)
prefix, prefix_lse = attend(*one, ckv, kpe, jnp.array([0, 1]), jnp.asarray(common, jnp.int32))
own_indptr = indptr - jnp.arange(4, dtype=jnp.int32)
own_pages = sum((allocator.pages(row)[1:] for row in rows.values()), [])
own, own_lse = attend(
    *(*queries, ckv, kpe, own_indptr, jnp.asarray(own_pages, jnp.int32)), kv_last_page_len=last
)
merged, merged_lse = mla_jax.merge_states(
    prefix.reshape(own.shape), prefix_lse.reshape(own_lse.shape), own, own_lse
)
error = np.abs(np.asarray(merged) - exact).max()
print(f"prefix and own pages, merged, deviate by {error:.1e}")
assert error < 1e-4
assert np.allclose(merged_lse, lse, atol=1e-4)
