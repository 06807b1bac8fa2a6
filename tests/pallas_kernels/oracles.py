"""Float64 NumPy oracles of the kernels, loops written from their contracts, and input makers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# For `jit(compiler_options=)`: what is compiled here runs once, so that compiling is all its time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Ids that no pool has; a kernel that reads one where it should not sees NaN or another's page.
GARBAGE = (-(2**31), -7, 0, 1, 10**6, 2**31 - 1)


def float64(array: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def assert_within(
    got: jax.Array | np.ndarray, want: np.ndarray, quantiles: dict[float, float]
) -> None:
    """The given quantiles of |got - want| stay within their bounds; infinities agree exactly."""
    got = float64(got)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    error = np.abs(got[finite] - want[finite])
    for quantile, bound in quantiles.items() if error.size else ():
        worst = np.quantile(error, quantile, method="higher")
        assert worst <= bound, f"{quantile} quantile of the error is {worst:.2e} > {bound:.2e}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCase:
    """The arrays of a `paged_decode` call; its ids lie in any order, between garbage."""

    q_nope: jax.Array
    q_pe: jax.Array
    ckv_cache: jax.Array
    kpe_cache: jax.Array
    page_ids: jax.Array
    start: jax.Array
    length: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_paged(
    rng: np.random.Generator,
    *,
    lengths: tuple[int, ...],
    page_size: int,
    heads: int,
    tokens: int = 1,
    latent: int = 64,
    rope: int = 16,
    dtype: str = "float32",
    num_pages: int | None = None,
    num_ids: int | None = None,
) -> PagedCase:
    """Requests of `lengths` tokens over a pool that is NaN wherever no request reads.

    Pages come in random order from a pool with spare ones. Two requests of full first pages share
    theirs. The requests' ids lie in random order in the flat vector, garbage before and after
    each. `num_pages` and `num_ids` fix the shapes, for calls that must not compile again.
    """
    pages_of = [-(-length // page_size) for length in lengths]
    num_pages = num_pages or sum(pages_of) + 3
    free = list(rng.permutation(num_pages))
    owned = [[int(free.pop()) for _ in range(count)] for count in pages_of]
    full = [b for b, length in enumerate(lengths) if length >= page_size]
    for b in full[1:2]:
        owned[b][0] = owned[full[0]][0]

    pools = []
    for width in (latent, rope):
        pool = np.full((num_pages, page_size, width), np.nan, np.float32)
        for pages, length in zip(owned, lengths, strict=True):
            for token in range(length):
                pool[pages[token // page_size], token % page_size] = rng.standard_normal(width)
        pools.append(jnp.asarray(pool, dtype))

    ids: list[int] = []
    start = np.zeros(len(lengths), np.int32)
    for b in rng.permutation(len(lengths)):
        ids += rng.choice(GARBAGE, rng.integers(0, 3)).tolist()
        start[b] = len(ids)
        ids += owned[b]
    ids += rng.choice(GARBAGE, (num_ids or len(ids) + 1) - len(ids)).tolist()

    rows = (len(lengths), tokens, heads)
    return PagedCase(
        q_nope=jnp.asarray(rng.standard_normal((*rows, latent)), dtype),
        q_pe=jnp.asarray(rng.standard_normal((*rows, rope)), dtype),
        ckv_cache=pools[0],
        kpe_cache=pools[1],
        page_ids=jnp.asarray(ids, jnp.int32),
        start=jnp.asarray(start),
        length=jnp.asarray(lengths, jnp.int32),
    )


def paged_attention(case: PagedCase, sm_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse): query token i of n sees the keys j <= length - n + i."""
    q_nope, q_pe = float64(case.q_nope), float64(case.q_pe)
    batch, tokens, heads, latent = q_nope.shape
    page_size = case.ckv_cache.shape[1]
    page_ids, start = np.asarray(case.page_ids), np.asarray(case.start)
    out = np.zeros((batch, tokens, heads, latent))
    lse = np.full((batch, tokens, heads), -np.inf)
    for b, length in enumerate(np.asarray(case.length)):
        pages = page_ids[start[b] :][: -(-length // page_size)]
        keys = float64(case.ckv_cache)[pages].reshape(-1, latent)
        rope = float64(case.kpe_cache)[pages].reshape(len(keys), q_pe.shape[-1])
        for i in range(tokens):
            seen = max(length - tokens + i + 1, 0)
            if seen == 0:
                continue
            scores = q_nope[b, i] @ keys[:seen].T + q_pe[b, i] @ rope[:seen].T
            out[b, i], lse[b, i] = softmax_sum(scores * sm_scale, keys[:seen])
    return out, lse


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCase:
    """The arrays of a `paged_prefill` call; rows of q in no request are NaN."""

    q_nope: jax.Array
    q_pe: jax.Array
    ckv_cache: jax.Array
    kpe_cache: jax.Array
    page_ids: jax.Array
    start: jax.Array
    length: jax.Array
    q_start: jax.Array
    q_count: jax.Array

    @property
    def args(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_prefill(
    rng: np.random.Generator,
    sizes: list[tuple[int, int]],
    *,
    page_size: int,
    heads: int,
    latent: int = 64,
    rope: int = 16,
    dtype: str = "float32",
    total: int | None = None,
    num_pages: int | None = None,
    num_ids: int | None = None,
) -> PrefillCase:
    """Requests of (n queries, m keys), gaps of padding between their queries and at the end.

    `total`, `num_pages` and `num_ids` fix the shapes, for calls that must not compile again.
    """
    counts = [n for n, _ in sizes]
    paged = make_paged(
        rng,
        lengths=tuple(m for _, m in sizes),
        page_size=page_size,
        heads=heads,
        latent=latent,
        rope=rope,
        dtype=dtype,
        num_pages=num_pages,
        num_ids=num_ids,
    )
    gaps = rng.integers(0, 3, len(sizes))
    gaps[0] = 0  # q_start ascends from 0
    q_start = np.cumsum(gaps + np.asarray([0, *counts[:-1]]))
    ranges = zip(q_start.tolist(), counts, strict=True)
    used = np.concatenate([np.arange(a, a + n, dtype=np.int64) for a, n in ranges])
    total = total or int(q_start[-1] + counts[-1] + 2)

    def rows(width: int) -> jax.Array:
        x = np.full((total, heads, width), np.nan)
        x[used] = rng.standard_normal((len(used), heads, width))
        return jnp.asarray(x, dtype)

    pools = {field: getattr(paged, field) for field in ("ckv_cache", "kpe_cache", "page_ids")}
    return PrefillCase(
        q_nope=rows(latent),
        q_pe=rows(rope),
        **pools,
        start=paged.start,
        length=paged.length,
        q_start=jnp.asarray(q_start, jnp.int32),
        q_count=jnp.asarray(counts, jnp.int32),
    )


def prefill_attention(case: PrefillCase, sm_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(out, base-2 lse): query i of n sees the keys j <= m - n + i; 0 and -inf where none."""
    q_nope, q_pe = float64(case.q_nope), float64(case.q_pe)
    latent, page_size = q_nope.shape[-1], case.ckv_cache.shape[1]
    ckv, kpe, page_ids = float64(case.ckv_cache), float64(case.kpe_cache), np.asarray(case.page_ids)
    out = np.zeros(q_nope.shape)
    lse = np.full(q_nope.shape[:2], -np.inf)
    for ids, m, row, n in zip(*(np.asarray(array) for array in case.args[5:]), strict=True):
        pages = page_ids[ids:][: -(-m // page_size)]
        keys = ckv[pages].reshape(-1, latent)[:m]
        rope = kpe[pages].reshape(len(pages) * page_size, q_pe.shape[-1])[:m]
        blind = min(max(n - m, 0), n) if m else n
        if n == blind:
            continue
        rows = slice(row + blind, row + n)
        scores = (q_nope[rows] @ keys.T + q_pe[rows] @ rope.T) * sm_scale
        hidden = np.arange(m) > np.arange(m - n + blind, m)[:, None]
        scores = np.where(hidden[:, None], -np.inf, scores)
        out[rows], lse[rows] = softmax_sum(scores, keys)
    return out, lse


def softmax_sum(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax(scores) @ values, log2 of the sum of exp(scores)), over the last axis."""
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total @ values, ((np.log(total) + top) / np.log(2))[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """The arrays of an `expert_ffn` call."""

    x: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    gate_up: jax.Array
    down: jax.Array
    shared: tuple[jax.Array, jax.Array] | None

    @property
    def args(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_experts(
    rng: np.random.Generator,
    expert_ids: np.ndarray,
    *,
    experts: int,
    shared: int = 0,
    dim: int = 32,
    inter: int = 48,
    dtype: str = "float32",
    unused: float = np.nan,
) -> ExpertCase:
    """Random weights for the given routing; an expert that no token chose holds `unused`."""

    def matrix(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    gate_up, down = matrix(experts, 2, inter, dim), matrix(experts, dim, inter)
    for weight in (gate_up, down):
        weight[~np.isin(np.arange(experts), expert_ids)] = unused
    always = None
    if shared:
        always = matrix(2, shared * inter, dim), matrix(dim, shared * inter)
        always = jnp.asarray(always[0], dtype), jnp.asarray(always[1], dtype)
    return ExpertCase(
        x=jnp.asarray(rng.standard_normal((expert_ids.shape[0], dim)), dtype),
        expert_ids=jnp.asarray(expert_ids, jnp.int32),
        weights=jnp.asarray(rng.uniform(0, 1, expert_ids.shape), jnp.float32),
        gate_up=jnp.asarray(gate_up, dtype),
        down=jnp.asarray(down, dtype),
        shared=always,
    )


def gated(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """down(silu(gate x) * (up x)) of one token."""
    gate, up = gate_up @ x
    return down @ (gate / (1 + np.exp(-gate)) * up)


def mixture(case: ExpertCase) -> np.ndarray:
    """Each token through its experts, one at a time."""
    x, gate_up, down = float64(case.x), float64(case.gate_up), float64(case.down)
    out = np.zeros_like(x)
    for token, ids in enumerate(np.asarray(case.expert_ids)):
        for slot, expert in enumerate(ids):
            share = float64(case.weights)[token, slot]
            out[token] += share * gated(x[token], gate_up[expert], down[expert])
        if case.shared is not None:
            out[token] += gated(x[token], *map(float64, case.shared))
    return out


def routing(
    logits: jax.Array | np.ndarray,
    bias: jax.Array | np.ndarray | None,
    *,
    active: int,
    groups: int = 1,
    limited_groups: int = 1,
    score: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) of each token's experts, best first; equal ones by id."""
    ids, weights = [], []
    for row in float64(logits):
        if score == "softmax":
            scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        else:
            scores = 1 / (1 + np.exp(-row))
        choice = scores if bias is None else scores + float64(bias)
        in_group = np.split(choice, groups)
        best_of = 1 if score == "softmax" else 2
        group_scores = [np.sort(group)[::-1][:best_of].sum() for group in in_group]
        eligible = np.argsort(-np.asarray(group_scores), kind="stable")[:limited_groups]
        size = len(row) // groups
        ranked = [e for e in np.argsort(-choice, kind="stable") if e // size in eligible]
        chosen = np.asarray(ranked[:active])
        weight = scores[chosen]
        if normalize:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(chosen)
        weights.append(weight * scale)
    return np.asarray(ids), np.asarray(weights)
