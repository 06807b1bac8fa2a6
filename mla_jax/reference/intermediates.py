"""Every intermediate value of one absorbed MLA attention step (seed 000).

A kernel author fills an `MLAInput`, runs `ref_kernel` and compares step by step. Symbols: batch b,
new tokens s, keys p = prefill + s, heads h, hidden d, latent l (`kv_lora_dim`). All weights are
[out, in]; there is no norm and no YaRN, and the cache holds the raw down-projection, not rotated.

Every step computes in float32 and rounds its result to the inputs' dtype, as a chain of PyTorch
operations on tensors of that dtype does.
"""

import dataclasses
import math
from typing import Self, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

DTYPES = ("float32", "bfloat16")
ROPE_TABLES = ("float32", "bfloat16")
_STATIC = {"static": True}


# JAX builds pytree dataclasses around tracers, shapes and axis numbers too, so a run-time type
# check of the fields would reject what `jit` and `eval_shape` legitimately put there.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAInput:
    """Activations, weights and cache of one MLA attention step, with seed 000's names.

    Arrays share one dtype, float32 or bfloat16. The integers are static under `jit`; `prefill`
    is the number of tokens already in the cache. Rows of `Q_proj_up_weight` are, per head,
    nope | rope; rows of `KV_proj_up_weight` are, per head, key | value; a cache row is
    latent | rope. Nothing is validated here: `ref_kernel` does it.

    >>> inputs = MLAInput.random(batch_size=2, hidden_dim=64, n_heads=4, max_seq_len=32, prefill=5)
    >>> inputs.kv_cache.shape
    (2, 32, 576)
    """

    x: Float[Array, "batch seq hidden"]
    Q_proj_down_weight: Float[Array, "q_lora hidden"]
    Q_proj_up_weight: Float[Array, "heads*(nope+rope) q_lora"]
    KV_proj_down_weight: Float[Array, "kv_lora+rope hidden"]
    KV_proj_up_weight: Float[Array, "heads*(nope+v) kv_lora"]
    wo_weight: Float[Array, "hidden heads*v"]
    kv_cache: Float[Array, "batch max_seq kv_lora+rope"]
    prefill: int = dataclasses.field(metadata=_STATIC)
    n_heads: int = dataclasses.field(metadata=_STATIC)
    kv_lora_dim: int = dataclasses.field(metadata=_STATIC)
    nope_dim: int = dataclasses.field(metadata=_STATIC)
    rope_dim: int = dataclasses.field(metadata=_STATIC)
    v_dim: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def random(
        cls,
        *,
        prefill: int,
        batch_size: int = 128,
        hidden_dim: int = 7168,
        q_lora_dim: int = 1536,
        seq_len: int = 1,
        n_heads: int = 128,
        kv_lora_dim: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        v_dim: int = 128,
        max_seq_len: int = 8192,
        seed: int = 0,
        dtype: DTypeLike = "bfloat16",
    ) -> Self:
        """Normal inputs of seed 000's sizes: x and cache of variance 1, weights 1/fan_in.

        The draw is in float32, so one seed gives the same numbers in both dtypes up to rounding.
        The default cache is 1.2 GB in bfloat16. Errors: ValueError for a size below 1, an odd
        `rope_dim`, or `prefill` and `seq_len` that do not fit `max_seq_len`; TypeError for a
        dtype other than float32 and bfloat16.

        >>> x = MLAInput.random(batch_size=1, hidden_dim=8, n_heads=2, max_seq_len=4, prefill=0).x
        >>> x.shape, x.dtype.name
        ((1, 1, 8), 'bfloat16')
        """
        dtype_ = _supported_dtype("dtype", dtype)
        _check_sizes(
            batch_size=batch_size,
            hidden_dim=hidden_dim,
            q_lora_dim=q_lora_dim,
            seq_len=seq_len,
            n_heads=n_heads,
            kv_lora_dim=kv_lora_dim,
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=v_dim,
            max_seq_len=max_seq_len,
        )
        _check_rope_and_prefill(rope_dim, prefill, seq_len, max_seq_len)
        keys = iter(jax.random.split(jax.random.key(seed), 7))

        def normal(*shape: int, fan_in: int = 1) -> Array:
            draw = jax.random.normal(next(keys), shape, jnp.float32)
            return (draw / math.sqrt(fan_in)).astype(dtype_)

        def weight(out_dim: int, in_dim: int) -> Array:
            return normal(out_dim, in_dim, fan_in=in_dim)

        return cls(
            x=normal(batch_size, seq_len, hidden_dim),
            Q_proj_down_weight=weight(q_lora_dim, hidden_dim),
            Q_proj_up_weight=weight(n_heads * (nope_dim + rope_dim), q_lora_dim),
            KV_proj_down_weight=weight(kv_lora_dim + rope_dim, hidden_dim),
            KV_proj_up_weight=weight(n_heads * (nope_dim + v_dim), kv_lora_dim),
            wo_weight=weight(hidden_dim, n_heads * v_dim),
            kv_cache=normal(batch_size, max_seq_len, kv_lora_dim + rope_dim),
            prefill=prefill,
            n_heads=n_heads,
            kv_lora_dim=kv_lora_dim,
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=v_dim,
        )


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intermediates:
    """What `ref_kernel` returns: seed 000's names and shapes, in the order they are computed.

    The dtype is the inputs', except `theta_ref`, which has the rope table's. `scores_ref` is the
    softmax's input: with more than one new token, keys a row may not see hold -inf there.
    """

    # step 0: cache
    kv_cache_step0_ref: Float[Array, "batch keys kv_lora+rope"]
    kv_lora_ref: Float[Array, "batch keys kv_lora"]
    k_rope_ref: Float[Array, "batch keys rope"]
    # step 1: query down-projection
    q_lora_ref: Float[Array, "batch seq q_lora"]
    # step 2: weights by head, and the absorbed query
    qup_nope_ref: Float[Array, "heads nope q_lora"]
    qup_rope_ref: Float[Array, "heads rope q_lora"]
    kup_nope_ref: Float[Array, "heads nope kv_lora"]
    vup_ref: Float[Array, "heads v kv_lora"]
    q_rope_step2_ref: Float[Array, "batch seq heads rope"]
    q_nope_ref: Float[Array, "batch seq heads nope"]
    q_absorb_ref: Float[Array, "batch seq heads kv_lora"]
    # step 2.5: heads first, and rotation
    q_rope_permuted_ref: Float[Array, "batch heads seq rope"]
    q_absorb_permuted_ref: Float[Array, "batch heads seq kv_lora"]
    theta_ref: Float[Array, " half"]
    q_rope_final_ref: Float[Array, "batch heads seq rope"]
    k_rope_final_ref: Float[Array, "batch keys rope"]
    # step 3: attention
    attn_nope_ref: Float[Array, "batch heads seq keys"]
    attn_rope_ref: Float[Array, "batch heads seq keys"]
    scores_ref: Float[Array, "batch heads seq keys"]
    attention_ref: Float[Array, "batch heads seq keys"]
    # step 4: output
    o_step4_0_ref: Float[Array, "batch heads seq kv_lora"]
    o_step4_1_ref: Float[Array, "batch heads seq v"]
    output_ref: Float[Array, "batch seq hidden"]


def round_to(value: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Round float32 values to `dtype` in a way that `jit` keeps.

    XLA may drop a float32 -> bfloat16 -> float32 round trip inside a fusion; it never drops
    `reduce_precision`, so the result is the same compiled or not.

    >>> round_to(jnp.float32(1.001), "bfloat16").item()
    1.0
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(value, info.nexp, info.nmant).astype(dtype)


def rounded_einsum(spec: str, left: Array, right: Array) -> Array:
    """`einsum` of two arrays of one dtype, accumulated in float32 and rounded once to that dtype.

    >>> rounded_einsum("i,i->", jnp.ones(3), jnp.ones(3)).item()
    3.0
    """
    # Widened first: XLA's CPU backend has no bfloat16 x bfloat16 -> float32 product.
    wide = (left.astype(jnp.float32), right.astype(jnp.float32))
    product = jnp.einsum(spec, *wide, precision="highest")
    return round_to(product, left.dtype)


def rope_tables(
    length: int, rope_dim: int, rope_table: str
) -> tuple[
    Float[np.ndarray, " half"], Float[np.ndarray, "length rope"], Float[np.ndarray, "length rope"]
]:
    """theta, cos and sin of positions 0..length-1, in the table's dtype, both halves alike.

    "float32" evaluates in float64 and rounds once. "bfloat16" repeats the original's arithmetic:
    base 10000 becomes 9984, and theta, the position and the angle are each rounded, which merges
    positions beyond 256. Made on the host, so every device gets the same bits.

    >>> theta, cos, sin = rope_tables(8, 64, "bfloat16")
    >>> theta.shape, cos.shape, sin.dtype.name
    ((32,), (8, 64), 'bfloat16')
    """
    positions = np.arange(length, dtype=np.float64)[:, None]
    exponents = -np.arange(rope_dim // 2) / (rope_dim // 2)
    dtype = jnp.dtype(rope_table)
    if rope_table == "float32":
        theta = 10000.0**exponents
        angles = positions * theta
    else:

        def rounded(value: np.ndarray) -> np.ndarray:
            return value.astype(dtype).astype(np.float64)

        theta = rounded(9984.0**exponents)
        angles = rounded(rounded(positions) * theta)
    angles = np.concatenate([angles, angles], axis=1)
    return theta.astype(dtype), np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def apply_half_split_rope(
    x: Float[Array, "... seq rope"],
    cos: Float[Array | np.ndarray, "seq rope"],
    sin: Float[Array | np.ndarray, "seq rope"],
) -> Float[Array, "... seq rope"]:
    """Rotate the pairs (x[i], x[i + rope/2]): x·cos + concat(-x2, x1)·sin.

    Each product is rounded to the tables' dtype, the sum to that of `x`.

    >>> apply_half_split_rope(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2))).tolist()
    [[-1.0, 1.0]]
    """
    table_dtype = cos.dtype
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    straight = jnp.concatenate([first, second], axis=-1) * jnp.asarray(cos, jnp.float32)
    turned = jnp.concatenate([-second, first], axis=-1) * jnp.asarray(sin, jnp.float32)
    straight, turned = (
        round_to(product, table_dtype).astype(jnp.float32) for product in (straight, turned)
    )
    return round_to(straight + turned, x.dtype)


def ref_kernel(inputs: MLAInput, *, rope_table: str = "float32") -> Intermediates:
    """Run one MLA attention step and keep every intermediate (seed 000).

    `inputs.kv_cache[:, :prefill]` is the past; the new tokens are appended to it, and new token i
    sees keys 0..prefill+i. The scale is (nope_dim + rope_dim)^-1/2. `rope_table`, "float32" or
    "bfloat16", is the precision of cos and sin (`rope_tables`); it is static under `jit`.

    Errors: ValueError for a shape that does not follow from the constants, a `prefill` outside
    the cache or an unknown `rope_table`; TypeError for an unsupported or mixed dtype.

    >>> inputs = MLAInput.random(batch_size=2, hidden_dim=64, n_heads=4, max_seq_len=32, prefill=5)
    >>> values = ref_kernel(inputs)
    >>> values.attention_ref.shape, values.output_ref.shape
    ((2, 4, 1, 6), (2, 1, 64))
    """
    _validate(inputs, rope_table)
    heads, prefill = inputs.n_heads, inputs.prefill
    dtype = inputs.x.dtype
    keys = prefill + inputs.x.shape[1]

    # step 0: append to the cache
    new_rows = rounded_einsum("bsd,ld->bsl", inputs.x, inputs.KV_proj_down_weight)
    kv_cache = jnp.concatenate([inputs.kv_cache[:, :prefill], new_rows], axis=1)
    kv_lora, k_rope = jnp.split(kv_cache, [inputs.kv_lora_dim], axis=-1)

    # step 1: query down-projection
    q_lora = rounded_einsum("bsd,ld->bsl", inputs.x, inputs.Q_proj_down_weight)

    # step 2: weights by head, query up-projection, absorption of the key up-projection
    qup = inputs.Q_proj_up_weight.reshape(heads, -1, q_lora.shape[-1])
    kvup = inputs.KV_proj_up_weight.reshape(heads, -1, inputs.kv_lora_dim)
    qup_nope, qup_rope = jnp.split(qup, [inputs.nope_dim], axis=1)
    kup_nope, vup = jnp.split(kvup, [inputs.nope_dim], axis=1)
    q_rope = rounded_einsum("bsl,hdl->bshd", q_lora, qup_rope)
    q_nope = rounded_einsum("bsl,hdl->bshd", q_lora, qup_nope)
    q_absorb = rounded_einsum("bshd,hdl->bshl", q_nope, kup_nope)

    # step 2.5: heads first; rotate the queries at their positions and the whole cache
    q_rope_permuted = q_rope.transpose(0, 2, 1, 3)
    q_absorb_permuted = q_absorb.transpose(0, 2, 1, 3)
    theta, cos, sin = rope_tables(keys, inputs.rope_dim, rope_table)
    q_rope_final = apply_half_split_rope(q_rope_permuted, cos[prefill:], sin[prefill:])
    k_rope_final = apply_half_split_rope(k_rope, cos, sin)

    # step 3: scores and softmax
    attn_nope = rounded_einsum("bhsl,bpl->bhsp", q_absorb_permuted, kv_lora)
    attn_rope = rounded_einsum("bhsd,bpd->bhsp", q_rope_final, k_rope_final)
    total = round_to(attn_nope.astype(jnp.float32) + attn_rope.astype(jnp.float32), dtype)
    scaled = total.astype(jnp.float32) / math.sqrt(inputs.nope_dim + inputs.rope_dim)
    visible = np.tri(keys - prefill, keys, prefill, dtype=bool)
    scores = jnp.where(visible, round_to(scaled, dtype), -jnp.inf)
    attention = round_to(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), dtype)

    # step 4: latent output, value up-projection, output projection
    o_latent = rounded_einsum("bhsp,bpl->bhsl", attention, kv_lora)
    o_heads = rounded_einsum("bhsl,hvl->bhsv", o_latent, vup)
    wo = inputs.wo_weight.reshape(-1, heads, inputs.v_dim)
    output = rounded_einsum("bhsv,dhv->bsd", o_heads, wo)

    return Intermediates(
        kv_cache_step0_ref=kv_cache,
        kv_lora_ref=kv_lora,
        k_rope_ref=k_rope,
        q_lora_ref=q_lora,
        qup_nope_ref=qup_nope,
        qup_rope_ref=qup_rope,
        kup_nope_ref=kup_nope,
        vup_ref=vup,
        q_rope_step2_ref=q_rope,
        q_nope_ref=q_nope,
        q_absorb_ref=q_absorb,
        q_rope_permuted_ref=q_rope_permuted,
        q_absorb_permuted_ref=q_absorb_permuted,
        theta_ref=jnp.asarray(theta),
        q_rope_final_ref=q_rope_final,
        k_rope_final_ref=k_rope_final,
        attn_nope_ref=attn_nope,
        attn_rope_ref=attn_rope,
        scores_ref=scores,
        attention_ref=attention,
        o_step4_0_ref=o_latent,
        o_step4_1_ref=o_heads,
        output_ref=output,
    )


def _validate(inputs: MLAInput, rope_table: str) -> None:
    if rope_table not in ROPE_TABLES:
        raise ValueError(f"rope_table: got {rope_table!r}, expected one of {ROPE_TABLES}")
    for name in ("x", "kv_cache", "Q_proj_down_weight"):
        array = getattr(inputs, name)
        rank = 2 if name.endswith("weight") else 3
        if array.ndim != rank:
            raise ValueError(f"{name}: got shape {array.shape}, expected {rank} dimensions")
    batch, seq, hidden = inputs.x.shape
    q_lora, max_seq = inputs.Q_proj_down_weight.shape[0], inputs.kv_cache.shape[1]
    constants = ("n_heads", "kv_lora_dim", "nope_dim", "rope_dim", "v_dim")
    _check_sizes(seq_len=seq, **{name: getattr(inputs, name) for name in constants})
    _check_rope_and_prefill(inputs.rope_dim, inputs.prefill, seq, max_seq)
    cached = inputs.kv_lora_dim + inputs.rope_dim
    expected = {
        "x": (batch, seq, hidden),
        "Q_proj_down_weight": (q_lora, hidden),
        "Q_proj_up_weight": (inputs.n_heads * (inputs.nope_dim + inputs.rope_dim), q_lora),
        "KV_proj_down_weight": (cached, hidden),
        "KV_proj_up_weight": (
            inputs.n_heads * (inputs.nope_dim + inputs.v_dim),
            inputs.kv_lora_dim,
        ),
        "wo_weight": (hidden, inputs.n_heads * inputs.v_dim),
        "kv_cache": (batch, max_seq, cached),
    }
    for name, shape in expected.items():
        array = getattr(inputs, name)
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
        if _supported_dtype(name, array.dtype) != inputs.x.dtype:
            raise TypeError(f"{name}: got {array.dtype}, expected x's dtype {inputs.x.dtype}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected a positive integer")


def _check_rope_and_prefill(rope_dim: int, prefill: int, seq_len: int, max_seq_len: int) -> None:
    if rope_dim % 2:
        raise ValueError(f"rope_dim: got {rope_dim}, expected an even number")
    if prefill < 0:
        raise ValueError(f"prefill: got {prefill}, expected 0 or more")
    if prefill + seq_len > max_seq_len:
        raise ValueError(
            f"prefill: got {prefill}, expected at most {max_seq_len=} - {seq_len=} = "
            f"{max_seq_len - seq_len}"
        )


def _supported_dtype(name: str, dtype: DTypeLike) -> np.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in DTYPES:
        raise TypeError(f"{name}: got {dtype!r}, expected one of {DTYPES}")
    return resolved
