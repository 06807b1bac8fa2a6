"""The Mosaic GPU kernel on the chip, beyond what it shares with Triton's tests."""

import functools
import os
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from on_gpu import needs_gpu, needs_hopper
from oracles import make_paged

from pallas_kernels.paged_decode import paged_decode

pytestmark = [needs_gpu, needs_hopper]


class Bucket(NamedTuple):
    """Problems of the same shapes, which one compilation serves."""

    heads: int
    tokens: int = 1
    page_size: int = 64
    batch: int = 16
    most_keys: int = 2048
    latent: int = 512
    rope: int = 64
    dtype: str = "bfloat16"
    deterministic: bool = False

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}"


PROBLEMS = 1000
BUCKETS = (
    Bucket(heads=128),
    Bucket(heads=128, tokens=2, page_size=8, batch=3, dtype="float16"),
    Bucket(heads=64, page_size=16, batch=300, most_keys=512),
    Bucket(heads=64, batch=1, most_keys=32768),
    Bucket(heads=126, page_size=32, latent=256, rope=0),
    Bucket(heads=128, page_size=128, deterministic=True),
    Bucket(heads=16, tokens=8, page_size=256, latent=384),
    Bucket(heads=9, tokens=5, latent=128, dtype="float16", deterministic=True),
    Bucket(heads=16),
    Bucket(heads=32, batch=1, most_keys=32768),
    Bucket(heads=8, batch=300, most_keys=512, page_size=16, latent=384),
    Bucket(heads=5, tokens=6, page_size=32, rope=0, dtype="float16", deterministic=True),
    Bucket(heads=16, batch=1, most_keys=32768),
    Bucket(heads=3, tokens=5, batch=300, most_keys=512, page_size=16, latent=384),
)
# Of the largest and of the root of the mean squared error; values are of the order of 1.
BOUNDS = {"bfloat16": (4e-2, 3e-3), "float16": (6e-3, 5e-4)}


@functools.partial(jax.jit, static_argnames="bucket")
def draw(key, length, bucket: Bucket):
    """Arguments of a call over pools that are NaN wherever no request reads, pages shuffled."""
    batch, size = bucket.batch, bucket.page_size
    pages = bucket.most_keys // size
    *keys, order = jax.random.split(key, 5)
    table = jax.random.permutation(order, batch * pages).astype(jnp.int32)
    unused = (jnp.arange(bucket.most_keys) >= length[:, None]).reshape(-1, size, 1)

    def pool(key, width):
        rows = jax.random.normal(key, (batch * pages, size, width), bucket.dtype)
        rows = jnp.where(unused, jnp.asarray(jnp.nan, bucket.dtype), rows)
        return jnp.zeros_like(rows).at[table].set(rows)

    widths = bucket.latent, bucket.rope
    queries = (
        jax.random.normal(key, (batch, bucket.tokens, bucket.heads, width), bucket.dtype)
        for key, width in zip(keys[:2], widths, strict=True)
    )
    pools = (pool(key, width) for key, width in zip(keys[2:], widths, strict=True))
    return *queries, *pools, table, jnp.arange(batch, dtype=jnp.int32) * pages, length


def attend(args, sm_scale, bucket: Bucket):
    """(out, lse) of the kernel."""
    return paged_decode(
        *args, sm_scale=sm_scale, backend="mosaic_gpu", deterministic=bucket.deterministic
    )


@functools.partial(jax.jit, static_argnames="bucket")
def errors(args, sm_scale, bucket: Bucket):
    """(largest, root mean square) error of out, largest of lse, and whether all are finite or,
    where a query has no key, as they must be; against float32 on the same inputs."""
    out, lse = attend(args, sm_scale, bucket)
    exact = (array.astype(jnp.float32) for array in args[:4])
    want, want_lse = paged_decode(*exact, *args[4:], sm_scale=sm_scale, backend="reference")
    empty = jnp.isneginf(want_lse)
    error = jnp.where(empty[..., None], out.astype(jnp.float32), out.astype(jnp.float32) - want)
    lse_error = jnp.where(empty, 0.0, lse - want_lse)
    right = jnp.isfinite(error).all() & (jnp.isneginf(lse) == empty).all()
    return jnp.abs(error).max(), jnp.sqrt(jnp.mean(error**2)), jnp.abs(lse_error).max(), right


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_random_ragged_problems(seed, rng, bucket):
    """Lengths of every size with empty ones among them, small and large scores."""
    keys = jax.random.split(jax.random.key(seed), PROBLEMS // len(BUCKETS))
    largest, root = BOUNDS[bucket.dtype]
    for number, key in enumerate(keys):
        longest = np.exp(rng.uniform(0, np.log(bucket.most_keys)))
        length = rng.integers(0, int(longest) + 1, bucket.batch) * (rng.random(bucket.batch) < 0.9)
        sm_scale = np.exp(rng.uniform(np.log(0.01), np.log(0.5)))
        args = draw(key, jnp.asarray(length, jnp.int32), bucket)
        most, mean, lse, right = errors(args, jnp.float32(sm_scale), bucket)
        told = (number, length.tolist(), sm_scale)
        assert right, told
        assert most <= largest, told
        assert mean <= root, told
        assert lse <= 1e-3, told


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_call_repeats_itself(seed, rng, bucket):
    """To the bit, 20 times, between calls that leave other bits in shared memory."""
    length = jnp.asarray(rng.integers(0, bucket.most_keys + 1, bucket.batch), jnp.int32)
    args, others = (draw(key, length, bucket) for key in jax.random.split(jax.random.key(seed), 2))

    @jax.jit
    def run(*args):
        return attend(args, 0.05, bucket)

    first = jax.device_get(run(*args))
    for _ in range(20):
        run(*others)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(*args)), first)


@pytest.mark.parametrize("names", [("h", "b", "wg", "x"), ("worker", "cluster", "warpgroup", "y")])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_in_a_mesh_of_the_same_names(rng, heads, names):
    """A kernel's axes must not be taken for those of a mesh around it."""
    case = make_paged(
        rng,
        lengths=(700, 0, 65, 3000),
        page_size=64,
        heads=heads,
        latent=512,
        rope=64,
        dtype="bfloat16",
    )

    def run(*args):
        return paged_decode(*args, sm_scale=0.05, backend="mosaic_gpu")

    want = jax.jit(run)(*case.args)
    mesh = jax.make_mesh((1,) * len(names), names, devices=jax.devices()[:1])
    everywhere = PartitionSpec()
    inside = jax.shard_map(
        run, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(inside)(*case.args), want)


COMPILE = """
import jax
import jax.numpy as jnp
from pallas_kernels.paged_decode import paged_decode

def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)

def ints(size):
    return shape(size, dtype=jnp.int32)

run = jax.jit(lambda *args: paged_decode(*args, sm_scale=0.05, backend="mosaic_gpu"))
queries = shape(64, 1, {heads}, 512), shape(64, 1, {heads}, 64)
pools = shape(4096, 64, 512), shape(4096, 64, 64)
run.lower(*queries, *pools, ints(4096), ints(64), ints(64)).compile()
"""


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_nothing_spills(heads):
    """Each order of one block, and a cluster of two, whose consumers need all their registers. Nor
    are products made to wait for each other, which ptxas does where it cannot follow the flow."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(heads=heads)],
        env={**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert spilled, said
    assert set(spilled) == {"0"}, said
    assert "are serialized" not in said, said
