"""Requests in CSR form for the paged functions, and their float64 oracle, from the contract."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from oracles import GARBAGE, float64, softmax_sum

# What a float32 result of values of order 1 may be off by.
CLOSE = {1.0: 1e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsrCase:
    """The arrays of a `mla_paged_prefill` call, and the length of every last page."""

    q_nope: jax.Array
    q_pe: jax.Array
    ckv_cache: jax.Array
    kpe_cache: jax.Array
    qo_indptr: jax.Array
    kv_indptr: jax.Array
    kv_indices: jax.Array
    last: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        """The positional arguments of `mla_paged_prefill`."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))[:-1]

    def decode_args(self, tokens: int | None = None) -> tuple[jax.Array, ...]:
        """Those of `mla_paged_decode`, for a case of `tokens` (None: one) queries a request."""
        batch = self.kv_indptr.shape[0] - 1
        leading = (batch,) if tokens is None else (batch, tokens)
        q = (x.reshape(*leading, *x.shape[1:]) for x in (self.q_nope, self.q_pe))
        return (*q, self.ckv_cache, self.kpe_cache, self.kv_indptr, self.kv_indices)


def make_csr(
    rng: np.random.Generator,
    lengths: Sequence[tuple[int, int]],
    *,
    page_size: int = 16,
    heads: int = 2,
    latent: int = 32,
    rope: int = 16,
    dtype: str = "float32",
    padding: int = 0,
    tokens: int | None = None,
    num_pages: int | None = None,
    num_ids: int | None = None,
    unused: float = np.nan,
) -> CsrCase:
    """Requests of (n queries, m keys) in a pool that is `unused` wherever no request reads.

    Pages come in random order; the first two requests with a full page share theirs. Behind the
    used ids stands garbage, behind the queries `padding` rows of NaN. `tokens`, `num_pages` and
    `num_ids` fix the shapes, for calls that must not compile again.
    """
    n, m = np.asarray(lengths).T
    pages_of = -(-m // page_size)
    num_pages = num_pages or int(pages_of.sum()) + 2
    free = list(rng.permutation(num_pages))
    owned = [[int(free.pop()) for _ in range(count)] for count in pages_of]
    full = np.flatnonzero(m >= page_size)
    if len(full) > 1:
        owned[full[1]][0] = owned[full[0]][0]

    pools = np.full((num_pages, page_size, latent + rope), unused, np.float32)
    for pages, length in zip(owned, m, strict=True):
        for token in range(length):
            slot = pages[token // page_size], token % page_size
            pools[slot] = rng.standard_normal(latent + rope)
    ids = [page for pages in owned for page in pages]
    ids += rng.choice(GARBAGE, (num_ids or len(ids) + 3) - len(ids)).tolist()
    rows = np.full((tokens or int(n.sum()) + padding, heads, latent + rope), np.nan, np.float32)
    rows[: n.sum()] = rng.standard_normal((n.sum(), heads, latent + rope))
    return CsrCase(
        q_nope=jnp.asarray(rows[..., :latent], dtype),
        q_pe=jnp.asarray(rows[..., latent:], dtype),
        ckv_cache=jnp.asarray(pools[..., :latent], dtype),
        kpe_cache=jnp.asarray(pools[..., latent:], dtype),
        qo_indptr=jnp.asarray(np.cumsum([0, *n]), jnp.int32),
        kv_indptr=jnp.asarray(np.cumsum([0, *pages_of]), jnp.int32),
        kv_indices=jnp.asarray(ids, jnp.int32),
        last=jnp.asarray(m - (pages_of - 1) * page_size * (pages_of > 0), jnp.int32),
    )


def attend_csr(
    case: CsrCase, sm_scale: float, *, full_pages: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse) of all rows: each request alone, query i of n sees keys j <= m - n + i.

    full_pages: a call without kv_last_page_len.
    """
    q_nope, q_pe, ckv, kpe = (float64(x) for x in case.args[:4])
    qo_indptr, kv_indptr, ids = (np.asarray(x) for x in case.args[4:])
    page_size = ckv.shape[1]
    out, lse = np.zeros(q_nope.shape), np.full(q_nope.shape[:2], -np.inf)
    for b in range(len(kv_indptr) - 1):
        pages = ids[kv_indptr[b] : kv_indptr[b + 1]]
        if len(pages) == 0:
            continue
        m = (len(pages) - 1) * page_size + (page_size if full_pages else int(case.last[b]))
        keys, rope = (pool[pages].reshape(len(pages) * page_size, -1)[:m] for pool in (ckv, kpe))
        n = qo_indptr[b + 1] - qo_indptr[b]
        for i in range(n):
            row, seen = qo_indptr[b] + i, m - n + i + 1
            if seen > 0:
                scores = q_nope[row] @ keys[:seen].T + q_pe[row] @ rope[:seen].T
                out[row], lse[row] = softmax_sum(scores * sm_scale, keys[:seen])
    return out, lse
