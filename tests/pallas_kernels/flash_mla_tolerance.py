"""FlashMLA's test of its decode kernel: inputs, a float64 reference, and the comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracles import PagedCase, float64

LATENT, ROPE, PAGE_SIZE = 512, 64, 64
SM_SCALE = (LATENT + ROPE) ** -0.5


def draw(
    seed: int, lengths: np.ndarray, *, tokens: int, heads: int, most_keys: int
) -> tuple[PagedCase, jax.Array]:
    """A bfloat16 case of randn / 10 within +-1, and its keys [B, most_keys, 576] without pages.

    Slots beyond a request's length are NaN in the pool. Shapes do not depend on the lengths.
    """
    batch, pages = len(lengths), -(-most_keys // PAGE_SIZE)
    q_key, k_key, order = jax.random.split(jax.random.key(seed), 3)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jnp.clip(jax.random.normal(key, shape, jnp.bfloat16) / 10, -1, 1)

    q = normal(q_key, batch, tokens, heads, LATENT + ROPE)
    keys = normal(k_key, batch, pages * PAGE_SIZE, LATENT + ROPE)
    length = jnp.asarray(lengths, jnp.int32)
    table = jax.random.permutation(order, batch * pages).astype(jnp.int32)
    unused = jnp.arange(pages * PAGE_SIZE) >= length[:, None]
    paged = jnp.where(unused[..., None], jnp.bfloat16(jnp.nan), keys)
    paged = paged.reshape(batch * pages, PAGE_SIZE, -1)
    pool = jnp.zeros_like(paged).at[table].set(paged)
    case = PagedCase(
        q_nope=q[..., :LATENT],
        q_pe=q[..., LATENT:],
        ckv_cache=pool[..., :LATENT],
        kpe_cache=pool[..., LATENT:],
        page_ids=table,
        start=jnp.arange(batch, dtype=jnp.int32) * pages,
        length=length,
    )
    return case, keys


@functools.partial(jax.jit, static_argnames="sm_scale")
def _attention(q, keys, length, sm_scale):
    q, keys = q.astype(jnp.float64), keys.astype(jnp.float64)
    tokens = q.shape[1]
    scores = jnp.einsum("bshd,btd->bsht", q, keys) * sm_scale
    last = length[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)  # [B, S]
    seen = jnp.arange(keys.shape[1], dtype=jnp.int32) <= last[..., None]  # [B, S, T]
    weights = jnp.where(seen[:, :, None], jnp.exp(scores), 0.0)  # inputs keep scores near 0
    total = weights.sum(axis=-1)
    out = jnp.einsum("bsht,btc->bshc", weights, keys[..., :LATENT])
    return out / jnp.where(total == 0, 1.0, total)[..., None], jnp.log(total)


def reference(
    case: PagedCase, keys: jax.Array, sm_scale: float = SM_SCALE
) -> tuple[np.ndarray, np.ndarray]:
    """(out, natural lse) in float64 on the default device, from keys that were never in pages."""
    with jax.enable_x64(True):
        q = jnp.concatenate([case.q_nope, case.q_pe], axis=-1)
        out, lse = _attention(q, keys, case.length, sm_scale=sm_scale)
        return np.asarray(out), np.asarray(lse)


def assert_close(got: np.ndarray, want: np.ndarray, *, name: str, absolute: float, relative: float):
    """Each element within the absolute or the relative bound; infinities agree exactly."""
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    error = np.abs(got[finite] - want[finite])
    bad = ~((error <= absolute) | (error <= relative * (np.abs(want[finite]) + 1e-6)))
    assert not bad.any(), f"{name}: {bad.sum()} of {bad.size} differ, by up to {error[bad].max()}"


def cosine_difference(got: np.ndarray, want: np.ndarray) -> float:
    """1 - 2 <a, b> / (<a, a> + <b, b>), over all elements; 0 for two zeros."""
    norms = (got * got).sum() + (want * want).sum()
    return 0.0 if norms == 0 else float(1 - 2 * (got * want).sum() / norms)


def assert_flash_mla(
    out: jax.Array | np.ndarray, lse: jax.Array | np.ndarray, want: tuple[np.ndarray, np.ndarray]
) -> None:
    """`out` and the base-2 `lse` are as near to `reference`'s as FlashMLA asks of its own."""
    got, want_out = float64(out), want[0]
    assert_close(got, want_out, name="out", absolute=8e-4, relative=2.01 / 128)
    natural = float64(lse) * np.log(2)
    assert_close(natural, want[1], name="lse", absolute=1e-6, relative=8.01 / 65536)
    assert cosine_difference(got, want_out) <= 5e-6
