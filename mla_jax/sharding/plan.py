"""What a mesh costs: bytes a device, and messages a decode step, from shapes alone.

Nothing is allocated, so that meshes can be compared which are not there.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from mla_jax.config import ModelConfig
from mla_jax.sharding.layout import check_cache, parameter_spec
from mla_jax.sharding.mesh import CONTEXT_AXIS, DATA_AXIS, MODEL_AXIS, check_mesh
from pallas_kernels.block_scaled import BlockScaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What a device sends in one direction, and the time of one message, however small.

    Errors: ValueError for a speed that is not above 0 or a latency below 0.
    """

    gb_per_s: float
    latency_us: float

    def __post_init__(self) -> None:
        if not self.gb_per_s > 0:
            raise ValueError(f"gb_per_s: got {self.gb_per_s}, expected more than 0")
        if not self.latency_us >= 0:
            raise ValueError(f"latency_us: got {self.latency_us}, expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A kind of message of a decode step. `bytes` is what one device brings to one of them."""

    kind: str
    axis: str
    devices: int
    count: int
    bytes: int

    def sent(self) -> float:
        """Bytes that one device sends for one of them, around a ring."""
        if self.kind == "all-reduce":
            return 2 * (self.devices - 1) / self.devices * self.bytes
        return (self.devices - 1) * self.bytes

    def seconds(self, link: Link) -> float:
        """Time of all `count`, one after the other: count * (latency + bytes sent / speed).

        >>> message = Message(kind="all-reduce", axis="model", devices=4, count=2, bytes=1000)
        >>> round(message.seconds(Link(gb_per_s=1, latency_us=10)) * 1e6, 6)
        23.0
        """
        return self.count * (link.latency_us * 1e-6 + self.sent() / (link.gb_per_s * 1e9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of each device, and the messages of a decode step."""

    devices: int
    weight_bytes: int
    cache_bytes: int
    logits_bytes: int
    messages: tuple[Message, ...]

    def message_seconds(self, link: Link) -> float:
        """Time of a step's messages, one after the other, all on links like this one."""
        return sum(message.seconds(link) for message in self.messages)


@functools.cache
def parameters(config: ModelConfig, dtype: str | None = None) -> dict[Any, nnx.Variable]:
    """The decoder's parameters by their paths, as shapes, with the layout that each asks for.

    dtype "fp8": the matrices that DeepSeek's checkpoints store as FP8 are, in blocks of 128 x 128.
    """
    from mla_jax.nn import Decoder  # which is built on this package
    from mla_jax.nn.linear import Weight

    if dtype not in (None, "fp8"):
        raise ValueError(f"dtype: got {dtype!r}, expected None or 'fp8'")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    found = dict(nnx.to_flat_state(nnx.state(model)))
    for parameter in found.values():
        if dtype == "fp8" and isinstance(parameter, Weight):
            parameter.set_value(BlockScaled.of_shape(parameter.shape))
    return found


def bytes_a_device(parameter: nnx.Variable, mesh: AbstractMesh) -> int:
    """How many of a parameter's bytes lie on each device."""
    sharding = NamedSharding(mesh, parameter_spec(parameter, mesh))
    return sum(
        math.prod(sharding.shard_shape(array.shape)) * jnp.dtype(array.dtype).itemsize
        for array in jax.tree.leaves(parameter.get_value())
    )


@functools.cache
def weight_bytes(config: ModelConfig, model: int, dtype: str | None = None) -> int:
    """Bytes of the parameters that lie on each device where `model` devices share them."""
    mesh = AbstractMesh((model,), (MODEL_AXIS,))
    return sum(bytes_a_device(each, mesh) for each in parameters(config, dtype).values())


def plan_decode(
    config: ModelConfig,
    *,
    batch: int,
    tokens: int,
    data: int = 1,
    model: int = 1,
    context: int = 1,
    page_size: int = 64,
    dtype: str | None = None,
) -> Plan:
    """The plan of decoding `batch` rows with room for `tokens` each, in the model's dtype.

    dtype "fp8" is `load_checkpoint`'s, for a checkpoint of DeepSeek's. The cache has just the pages
    that the rows fill, its table and its lengths. Errors: ValueError for a mesh that does not
    divide the model, the blocks of FP8 weights, the rows, or, rounded up, their pages.

    >>> from mla_jax import presets
    >>> plan = plan_decode(presets["tiny"], batch=4, tokens=128, model=2)
    >>> [(message.kind, message.count, message.bytes) for message in plan.messages]
    [('all-reduce', 8, 3072)]
    """
    for name, size in {"batch": batch, "tokens": tokens, "page_size": page_size}.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    mesh = AbstractMesh((data, context, model), (DATA_AXIS, CONTEXT_AXIS, MODEL_AXIS))
    check_mesh(config, mesh)
    max_pages = -(-tokens // page_size)
    check_cache(mesh, num_pages=data * context, max_batch=batch)
    rows, item = batch // data, jnp.dtype(config.dtype).itemsize
    pages = -(-rows * max_pages // context)

    mla = config.mla
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    slot = latent * item
    if mla.index_n_heads:
        slot += mla.index_head_dim + jnp.dtype(jnp.float32).itemsize  # FP8 and a scale
    pools = pages * page_size * slot * config.n_layers
    table = rows * (max_pages + 1) * jnp.dtype(jnp.int32).itemsize
    vocab = config.vocab if config.tie_embeddings else config.vocab // model

    # A head's values and its log-sum-exp, before the values of all heads are multiplied.
    partial = (
        rows * mla.n_heads // model * (mla.v_head_dim * item + jnp.dtype(jnp.float32).itemsize)
    )
    hidden = rows * mla.dim * item
    messages = (
        Message(
            kind="all-reduce",
            axis=MODEL_AXIS,
            devices=model,
            count=2 * config.n_layers,
            bytes=hidden,
        ),
        Message(
            kind="all-gather",
            axis=CONTEXT_AXIS,
            devices=context,
            count=config.n_layers,
            bytes=partial,
        ),
    )
    return Plan(
        devices=data * context * model,
        weight_bytes=weight_bytes(config, model, dtype),
        cache_bytes=pools + table,
        logits_bytes=rows * vocab * jnp.dtype(jnp.float32).itemsize,
        messages=tuple(message for message in messages if message.devices > 1),
    )
