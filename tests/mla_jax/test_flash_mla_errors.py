"""Each row of the error table and the quick checks: the argument, the shapes, the fix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.flash_mla import (
    flash_mla_prefill,
    flash_mla_with_kvcache,
    get_mla_metadata,
    mha_fwd_kvcache,
)

HEADS = r"Adjust q reshape or head-splitting for MLA$"
BLOCKS = r"Update block_table or cache allocation$"
STRIDES = r"Call \.contiguous\(\) or re-pack before kernel call$"
MASK = r"Pad mask or recompute with correct seq length$"
LENGTHS = r"Grow cache or truncate sequence$"
DTYPES = r"Cast consistently to FP8/BF16/FP16$"

B, HQ, HK, N, D = 2, 4, 2, 3, 16


def decode_args(**changes: Any) -> dict[str, Any]:
    args = {
        "q": np.ones((B, HQ, 1, D), np.float32),
        "k_cache": np.ones((B, HK, N, 64, D), np.float32),
        "v_cache": np.ones((B, HK, N, 64, D), np.float32),
        "block_table": np.asarray([[2, 0, 1], [1, 2, 0]], np.int32),
        "seq_lens": np.asarray([130, 5], np.int32),
    }
    return args | changes


def mha_args(**changes: Any) -> dict[str, Any]:
    args = {
        "q": np.ones((B, HK, 130, D), np.float32),
        "k_cache": np.ones((B, HK, N, 64, D), np.float32),
        "v_cache": np.ones((B, HK, N, 64, D), np.float32),
        "block_table": np.asarray([[2, 0, 1], [1, 2, 0]], np.int32),
    }
    return args | changes


def prefill_args(**changes: Any) -> dict[str, Any]:
    args = {
        "q": np.ones((B, HQ, 70, D), np.float32),
        "k": np.ones((B, HK, 70, D), np.float32),
        "v": np.ones((B, HK, 70, D), np.float32),
    }
    return args | changes


def refuses(error, match, function, args):
    with pytest.raises(error, match=match) as caught:
        function(**args)
    assert "\n" not in str(caught.value)


def every_call(match, error: type[Exception] = ValueError, **changes):
    """The same change is refused by decode, and by the metadata's check where it can see it."""
    args = decode_args(**changes)
    refuses(error, match, flash_mla_with_kvcache, args)
    if set(changes) <= {"q", "block_table", "seq_lens"}:
        shapes = {"q_shape": args["q"].shape, "kv_shape": args["k_cache"].shape}
        requests = {name: args[name] for name in ("block_table", "seq_lens")}
        refuses(error, match, get_mla_metadata, shapes | requests)


def test_the_arguments_are_fine():
    args = decode_args()
    metadata = get_mla_metadata(
        args["q"].shape, args["k_cache"].shape, args["block_table"], args["seq_lens"]
    )
    assert hash(metadata) == hash(metadata)
    assert flash_mla_with_kvcache(**args, metadata=metadata).shape == (B, HQ, 1, D)
    assert mha_fwd_kvcache(**mha_args()).shape == (B, HK, 130, D)
    assert flash_mla_prefill(**prefill_args()).shape == (B, HQ, 70, D)
    lists = decode_args(block_table=[[2, 0, 1], [1, 2, 0]], seq_lens=[130, 5])
    assert flash_mla_with_kvcache(**lists).shape == (B, HQ, 1, D)


def test_heads():
    every_call(
        r"q: got 3 heads in shape \(2, 3, 1, 16\), expected a multiple of the 2 in k_cache's shape "
        rf"\(2, 2, 3, 64, 16\)\. {HEADS}",
        q=np.ones((B, 3, 1, D), np.float32),
    )
    q = np.ones((B, 3, 70, D), np.float32)
    refuses(
        ValueError, f"q: got 3 heads .* k's shape .*{HEADS}", flash_mla_prefill, prefill_args(q=q)
    )
    q = np.ones((B, 3, 130, D), np.float32)
    refuses(ValueError, f"q: got 3 heads .*{HEADS}", mha_fwd_kvcache, mha_args(q=q))


def test_block_counts():
    short = np.zeros((B, 2), np.int32)
    match = (
        r"block_table: got shape \(2, 2\), expected \(2, 3\) beside k_cache's shape "
        rf"\(2, 2, 3, 64, 16\)\. {BLOCKS}"
    )
    every_call(match, block_table=short)
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(block_table=short))
    fewer = np.ones((B, HK, 2, 64, D), np.float32)
    match = rf"v_cache: got shape \(2, 2, 2, 64, 16\), expected k_cache's \(2, .*{BLOCKS}"
    every_call(match, v_cache=fewer)
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(v_cache=fewer))
    long = np.ones((B, HK, 200, D), np.float32)
    match = (
        rf"block_table: got 3 blocks in shape \(2, 3\), expected 4 .* \(2, 2, 200, 16\)\. {BLOCKS}"
    )
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(q=long))


def test_block_size():
    small = np.ones((B, HK, N, 32, D), np.float32)
    match = rf"k_cache: got blocks of 32 in shape .* expected 64\. {BLOCKS}"
    every_call(match, k_cache=small, v_cache=small)
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(k_cache=small, v_cache=small))


def strided(shape, order):
    """An array of `shape` whose memory has its axes in another order."""
    array = np.ones([shape[i] for i in order], np.float32)
    return array.transpose(np.argsort(order))


def test_inner_strides():
    cache = strided((B, HK, N, 64, D), (0, 1, 2, 4, 3))
    every_call(
        rf"k_cache: got strides \(\d+, \d+, \d+, 1, 64\) for shape .*{STRIDES}", k_cache=cache
    )
    every_call(rf"v_cache: got strides .*{STRIDES}", v_cache=cache)
    for q in (np.ones((B, HQ, 1, 2 * D))[..., ::2], np.ones((B, 2 * HQ, 1, D))[:, ::2]):
        args = decode_args(q=q)
        refuses(ValueError, f"q: got strides .*{STRIDES}", flash_mla_with_kvcache, args)
    wide = np.zeros((B, 2 * N), np.int32)[:, ::2]
    match = f"block_table: got strides .*{STRIDES}"
    args = decode_args(block_table=wide)
    refuses(ValueError, match, flash_mla_with_kvcache, args)
    refuses(
        ValueError,
        match,
        get_mla_metadata,
        {
            "q_shape": args["q"].shape,
            "kv_shape": args["k_cache"].shape,
            "block_table": wide,
            "seq_lens": args["seq_lens"],
        },
    )
    for name in ("q", "k", "v"):
        shape = prefill_args()[name].shape
        args = prefill_args(**{name: strided(shape, (0, 1, 3, 2))})
        refuses(ValueError, rf"{name}: got strides .*{STRIDES}", flash_mla_prefill, args)
    args = mha_args(k_cache=cache)
    refuses(ValueError, f"k_cache: got strides .*{STRIDES}", mha_fwd_kvcache, args)


def test_leading_strides():
    """Positive and falling ones may be as they like; others may not."""
    padded = np.ones((B, 2 * HK, N + 1, 64, D), np.float32)[:, ::2, :N]
    assert flash_mla_with_kvcache(**decode_args(k_cache=padded)).shape == (B, HQ, 1, D)
    every_call(
        f"k_cache: got strides .*{STRIDES}", k_cache=strided((B, HK, N, 64, D), (1, 0, 2, 3, 4))
    )
    backwards = np.ones((B, HK, N, 64, D), np.float32)[::-1]
    every_call(f"k_cache: got strides .*{STRIDES}", k_cache=backwards)
    repeated = np.broadcast_to(np.ones((1, HK, N, 64, D), np.float32), (B, HK, N, 64, D))
    every_call(f"k_cache: got strides .*{STRIDES}", k_cache=repeated)
    sliced = prefill_args(q=np.ones((B, HQ, 140, D), np.float32)[:, :, ::2])
    assert flash_mla_prefill(**sliced).shape == (B, HQ, 70, D)
    swapped = prefill_args(q=strided((B, HQ, 70, D), (0, 2, 1, 3)))
    refuses(ValueError, f"q: got strides .*{STRIDES}", flash_mla_prefill, swapped)


class Torch:
    """What the checks see of a torch tensor: strides in elements, a dtype of its own, DLPack."""

    def __init__(self, array: np.ndarray, dtype: str):
        self.array, self.dtype, self.shape = array, f"torch.{dtype}", array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def contiguous(self) -> "Torch":
        return Torch(np.ascontiguousarray(self.array), self.dtype.removeprefix("torch."))

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_torch(rng):
    args = decode_args(
        **{
            name: rng.standard_normal(decode_args()[name].shape, np.float32)
            for name in ("q", "k_cache", "v_cache")
        }
    )
    want = flash_mla_with_kvcache(**args)
    tensors: dict[str, Any] = {name: Torch(array, str(array.dtype)) for name, array in args.items()}
    np.testing.assert_array_equal(flash_mla_with_kvcache(**tensors), want)
    swapped = Torch(args["q"].reshape(B, 1, HQ, D).swapaxes(1, 2)[:, ::-1], "float32")
    refuses(
        ValueError, f"q: got strides .*{STRIDES}", flash_mla_with_kvcache, tensors | {"q": swapped}
    )
    half = Torch(args["q"].astype(np.float16), "float16")
    refuses(
        TypeError,
        f"k_cache: got dtype float32 beside q's float16.*{DTYPES}",
        flash_mla_with_kvcache,
        tensors | {"q": half},
    )


def test_mask_length():
    mask = np.ones((B, 1, 1, 129), bool)
    match = rf"mask: got a last dim of 129 in shape \(2, 1, 1, 129\), expected at least 130.*{MASK}"
    refuses(ValueError, match, flash_mla_with_kvcache, decode_args(mask=mask))
    mask = np.ones((B, 1, 70, 69), bool)
    match = rf"attn_mask: got a last dim of 69 in shape .* \(2, 4, 70, 16\)\. {MASK}"
    refuses(ValueError, match, flash_mla_prefill, prefill_args(attn_mask=mask))
    mask = np.ones((B, 1, 130, 100), bool)
    match = f"attn_mask: got a last dim of 100 .*{MASK}"
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(attn_mask=mask))


def test_mask_shape_and_dtype():
    for shape in ((B, 3, 1, 130), (B, 1, 2, 130), (B, 130), (1, 1, 1, 130)):
        args = decode_args(mask=np.ones(shape, bool))
        refuses(
            ValueError, r"mask: got shape .*, expected \(2, 1, 1\) or", flash_mla_with_kvcache, args
        )
    args = decode_args(mask=np.ones((B, 1, 1, 130), np.int32))
    refuses(TypeError, "mask: got dtype int32, expected bool", flash_mla_with_kvcache, args)
    for shape in ((B, 1, 69, 70), (B, 2, 70, 70), (70,)):
        args = prefill_args(attn_mask=np.ones(shape, bool))
        refuses(ValueError, "attn_mask: got shape", flash_mla_prefill, args)


@pytest.mark.parametrize("lengths", [[193, 5], [0, -1]])
def test_lengths(lengths):
    every_call(
        rf"seq_lens: got {min(lengths)} to {max(lengths)}, expected 0 to 192, .* "
        rf"block_table's shape \(2, 3\)\. {LENGTHS}",
        seq_lens=np.asarray(lengths, np.int32),
    )
    every_call(r"seq_lens: got shape \(3,\), expected \(2,\)", seq_lens=np.zeros(3, np.int32))


def test_dtypes():
    match = rf"k_cache: got dtype float32 beside q's bfloat16, expected the same\. {DTYPES}"
    q = jnp.ones((B, HQ, 1, D), jnp.bfloat16)
    refuses(TypeError, match, flash_mla_with_kvcache, decode_args(q=q))
    for dtype in (np.float64, np.int8):
        args = {n: decode_args()[n].astype(dtype) for n in ("q", "k_cache", "v_cache")}
        match = rf"q: got dtype {np.dtype(dtype)}, expected one of .*float8_e4m3fn\. {DTYPES}"
        refuses(TypeError, match, flash_mla_with_kvcache, decode_args(**args))
    v = np.ones((B, HK, 70, D), np.float16)
    refuses(TypeError, f"v: got dtype float16 .*{DTYPES}", flash_mla_prefill, prefill_args(v=v))
    new = np.ones((B, HK, 130, D), np.float16)
    args = mha_args(k_new=new.astype(np.float32), v_new=new)
    refuses(TypeError, f"v_new: got dtype float16 .*{DTYPES}", mha_fwd_kvcache, args)
    every_call(
        "seq_lens: got dtype float32, expected integers", TypeError, seq_lens=np.ones(B, np.float32)
    )
    every_call(
        "block_table: got dtype float32, expected integers",
        TypeError,
        block_table=np.zeros((B, N), np.float32),
    )


def test_block_ids():
    """A used one out of range; garbage behind the used ones is nobody's business."""
    for bad in (3, -1):
        table = np.asarray([[2, 0, bad], [1, bad, bad]], np.int32)
        match = (
            rf"block_table: got block id {bad} at \[0, 2\] in shape \(2, 3\), expected 0 to 2\. "
            rf"{BLOCKS}"
        )
        every_call(match, block_table=table)
        refuses(ValueError, match, mha_fwd_kvcache, mha_args(block_table=table))
        args = decode_args(block_table=table, seq_lens=np.asarray([128, 64], np.int32))
        assert flash_mla_with_kvcache(**args).shape == (B, HQ, 1, D)


def test_blocks_are_written_once():
    table = np.asarray([[2, 0, 1], [1, 1, 0]], np.int32)
    new = np.ones((B, HK, 130, D), np.float32)
    match = rf"block_table: got a block id twice in row 1 of shape \(2, 3\).*{BLOCKS}"
    refuses(ValueError, match, mha_fwd_kvcache, mha_args(block_table=table, k_new=new, v_new=new))
    assert mha_fwd_kvcache(**mha_args(block_table=table)).shape == (B, HK, 130, D)


def test_new_tokens():
    new = np.ones((B, HK, 130, D), np.float32)
    refuses(ValueError, "v_new: got None", mha_fwd_kvcache, mha_args(k_new=new))
    refuses(ValueError, "k_new: got None", mha_fwd_kvcache, mha_args(v_new=new))
    args = mha_args(k_new=new, v_new=new[:, :, :9])
    refuses(ValueError, r"v_new: got shape .* beside q's shape", mha_fwd_kvcache, args)


def test_other_shapes():
    every_call(
        r"q: got shape \(2, 4, 16\), expected \[batch, heads", q=np.ones((B, HQ, D), np.float32)
    )
    every_call(r"q: got 2 tokens in shape", q=np.ones((B, HQ, 2, D), np.float32))
    every_call(r"k_cache: got shape .* beside q's shape", q=np.ones((B, HQ, 1, 32), np.float32))
    every_call(r"k_cache: got shape .* beside q's shape", q=np.ones((1, HQ, 1, D), np.float32))
    every_call("q: got shape .* none empty", q=np.ones((B, 0, 1, D), np.float32))
    refuses(
        ValueError,
        "v: got shape",
        flash_mla_prefill,
        prefill_args(v=np.ones((B, HK, 71, D), np.float32)),
    )
    refuses(
        ValueError,
        "k: got shape",
        flash_mla_prefill,
        prefill_args(k=np.ones((HK, 70, D), np.float32)),
    )
    refuses(
        ValueError,
        r"layout: got shape \(3, 3\), expected \[2, 2\], \[2, 2, 2\] or \[2, 1 or 4",
        flash_mla_prefill,
        prefill_args(sparse_layout=np.ones((3, 3), bool)),
    )
    refuses(
        ValueError,
        "attn_sink: got an array",
        flash_mla_with_kvcache,
        decode_args(attn_sink=np.ones(HQ, np.float32)),
    )


def test_metadata_of_other_arrays():
    args = decode_args()
    metadata = get_mla_metadata(
        (B, 2 * HQ, 1, D), args["k_cache"].shape, args["block_table"], args["seq_lens"]
    )
    refuses(
        ValueError,
        "metadata: got MLAMetadata",
        flash_mla_with_kvcache,
        args | {"metadata": metadata},
    )


def test_traced_values_are_not_looked_at():
    args = {name: jnp.asarray(array) for name, array in decode_args().items()}
    call = jax.jit(flash_mla_with_kvcache)
    bad = args | {"seq_lens": jnp.asarray([999, -4]), "block_table": args["block_table"] + 7}
    assert call(**bad).shape == (B, HQ, 1, D)
    with pytest.raises(ValueError, match="block_table: got shape"):
        call(**args | {"block_table": args["block_table"][:, :2]})


def test_backends():
    for function, args in (
        (flash_mla_with_kvcache, decode_args()),
        (flash_mla_prefill, prefill_args()),
        (mha_fwd_kvcache, mha_args()),
    ):
        refuses(ValueError, "backend: got 'x'", function, args | {"backend": "x"})
        refuses(NotImplementedError, "mosaic_gpu", function, args | {"backend": "mosaic_gpu"})
