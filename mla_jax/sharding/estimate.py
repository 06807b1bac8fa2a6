"""How long a decode step takes on paper: what each device of a mesh reads, computes and exchanges.

    step = max(weights read, their products) + max(cache read, attention) + messages

Reads and products of one phase overlap, phases follow each other, and no message hides behind
anything: a floor that real kernels exceed, and the same sum for every mesh, so that meshes can be
compared. Of the routed experts a step reads those that some row is expected to choose, where each
row's choice is uniform and independent of the others'.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from mla_jax.config import ModelConfig
from mla_jax.sharding.mesh import CONTEXT_AXIS, MODEL_AXIS, check_mesh
from mla_jax.sharding.plan import (
    Link,
    Message,
    Plan,
    bytes_a_device,
    parameters,
    plan_decode,
    weight_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one device, and its links: `node` devices are on `link`, others on `network`.

    network None: one link for all. Errors: ValueError for a rate that is not above 0.
    """

    memory_gb: float
    bandwidth_gb_s: float
    tflop_s: float
    link: Link
    node: int = 8
    network: Link | None = None

    def __post_init__(self) -> None:
        for name in ("memory_gb", "bandwidth_gb_s", "tflop_s", "node"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")

    def link_over(self, span: int) -> Link:
        """What connects `span` devices that stand next to each other."""
        within = self.network is None or self.node % span == 0
        return self.link if within else self.network  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step of `batch` rows on a mesh: its plan, and the seconds of its parts."""

    data: int
    context: int
    model: int
    batch: int
    plan: Plan
    fits: bool
    weight_seconds: float
    product_seconds: float
    cache_seconds: float
    attention_seconds: float
    message_seconds: float

    @property
    def device_bytes(self) -> int:
        """Weights, cache and logits of one device."""
        return self.plan.weight_bytes + self.plan.cache_bytes + self.plan.logits_bytes

    @property
    def seconds(self) -> float:
        weights = max(self.weight_seconds, self.product_seconds)
        return weights + max(self.cache_seconds, self.attention_seconds) + self.message_seconds

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together."""
        return self.batch / self.seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of reads, arithmetic and messages, by name."""
        return {
            "weights": self.weight_seconds,
            "products": self.product_seconds,
            "cache": self.cache_seconds,
            "attention": self.attention_seconds,
            "messages": self.message_seconds,
        }

    @property
    def bound(self) -> str:
        """The longest part, which a step cannot be shorter than."""
        return max(self.parts, key=self.parts.__getitem__)


def experts_hit(config: ModelConfig, rows: int) -> float:
    """The share of a layer's routed experts that at least one of `rows` rows is expected to choose.

    >>> from mla_jax import presets
    >>> [round(experts_hit(presets["deepseek-v3"], rows), 3) for rows in (1, 32, 256)]
    [0.031, 0.638, 1.0]
    """
    if config.moe is None:
        return 0.0
    return 1 - (1 - config.moe.n_active / config.moe.n_routed) ** rows


def estimate_step(
    config: ModelConfig,
    machine: Machine,
    *,
    batch: int,
    tokens: int,
    data: int = 1,
    context: int = 1,
    model: int = 1,
    page_size: int = 64,
    dtype: str | None = None,
) -> Step:
    """A decode step of `batch` rows with `tokens` cached each, on data * context * model devices.

    dtype: as in `plan_decode`. Products count at the machine's one rate. Errors: `plan_decode`'s.

    >>> from mla_jax import presets
    >>> link = Link(gb_per_s=400, latency_us=10)
    >>> h200 = Machine(memory_gb=141, bandwidth_gb_s=4000, tflop_s=700, link=link)
    >>> step = estimate_step(presets["deepseek-v2-lite"], h200, batch=1, tokens=1024, model=2)
    >>> step.fits, step.bound, round(step.seconds * 1e3, 2)
    (True, 'weights', 1.17)
    """
    sizes = {"data": data, "context": context, "model": model}
    plan = plan_decode(
        config, batch=batch, tokens=tokens, page_size=page_size, dtype=dtype, **sizes
    )
    rows = batch // data
    read, products = _weights(config, rows, model, dtype)

    mla = config.mla
    width = mla.kv_lora_rank + mla.qk_rope_head_dim
    pages = math.ceil(math.ceil(tokens / page_size) / context)  # the fullest device's
    keys = rows * min(tokens, pages * page_size) * config.n_layers
    index_bytes = index_products = 0
    if mla.index_n_heads:  # it reads and scores every key, whole on every device; attention few
        index_bytes = keys * (mla.index_head_dim + 4)
        index_products = 2 * keys * mla.index_n_heads * mla.index_head_dim
        keys = rows * min(tokens, mla.index_topk) * config.n_layers
    cached = keys * width * jnp.dtype(config.dtype).itemsize + index_bytes
    attention = 2 * keys * mla.n_heads // model * (width + mla.kv_lora_rank) + index_products

    bandwidth, rate = machine.bandwidth_gb_s * 1e9, machine.tflop_s * 1e12
    step = Step(
        **sizes,
        batch=batch,
        plan=plan,
        fits=True,
        weight_seconds=read / bandwidth,
        product_seconds=products / rate,
        cache_seconds=cached / bandwidth,
        attention_seconds=attention / rate,
        message_seconds=sum(
            message.seconds(machine.link_over(_span(message, model))) for message in plan.messages
        ),
    )
    return dataclasses.replace(step, fits=step.device_bytes <= machine.memory_gb * 1e9)


def rank_meshes(
    config: ModelConfig,
    machine: Machine,
    *,
    devices: int,
    batch: int,
    tokens: int,
    page_size: int = 64,
    dtype: str | None = None,
) -> list[Step]:
    """Every mesh of so many devices that divides model and batch: those that fit first, by speed.

    Errors: ValueError for a size below 1.

    >>> from mla_jax import presets
    >>> link = Link(gb_per_s=400, latency_us=10)
    >>> h200 = Machine(memory_gb=141, bandwidth_gb_s=4000, tflop_s=700, link=link)
    >>> best = rank_meshes(presets["tiny"], h200, devices=2, batch=8, tokens=64)[0]
    >>> best.data, best.context, best.model
    (2, 1, 1)
    """
    for name, size in {"devices": devices, "batch": batch}.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    sizes = {"batch": batch, "tokens": tokens, "page_size": page_size}
    steps = [
        estimate_step(
            *(config, machine),
            **sizes,
            data=data,
            context=devices // data // model,
            model=model,
            dtype=dtype,
        )
        for model in filter(lambda parts: _splits(config, parts, dtype), _divisors(devices))
        for data in _divisors(devices // model)
        if batch % data == 0 and (data * model == devices or not config.mla.index_n_heads)
    ]
    return sorted(steps, key=lambda step: (not step.fits, step.seconds))


def _weights(config: ModelConfig, rows: int, model: int, dtype: str | None) -> tuple[float, float]:
    """Of a device: (bytes that a step reads, operations of its products)."""
    hit = experts_hit(config, rows)
    chosen = 0.0 if config.moe is None else config.moe.n_active / config.moe.n_routed
    read = products = 0.0
    for kind, (values, size) in _values(config, model, dtype).items():
        if kind == "embedding" and not config.tie_embeddings:
            continue  # a row a token, not the table
        read += size * (hit if kind == "expert" else 1)
        products += 2 * rows * values * (chosen if kind == "expert" else 1)
    return read, products


@functools.cache
def _values(config: ModelConfig, model: int, dtype: str | None) -> dict[str, tuple[int, int]]:
    """How many weights of each kind a device has, and their bytes."""
    mesh = AbstractMesh((model,), (MODEL_AXIS,))
    found: dict[str, tuple[int, int]] = {}
    for path, parameter in parameters(config).items():
        if path == ("embed",):
            kind = "embedding"
        elif path == ("head",) or "router" in path or parameter.ndim == 1:
            kind = "plain"
        else:
            stacked = parameter.ndim > 2 and parameter.get_metadata()["out_sharding"][0]
            kind = "expert" if stacked == MODEL_AXIS else "matrix"
        values = bytes_a_device(parameter, mesh) // jnp.dtype(parameter.dtype).itemsize
        size = bytes_a_device(parameters(config, dtype)[path], mesh)
        before = found.get(kind, (0, 0))
        found[kind] = before[0] + values, before[1] + size
    return found


def _span(message: Message, model: int) -> int:
    """From the first to the last device of a message, as `make_mesh` lays them out."""
    return message.devices * (model if message.axis == CONTEXT_AXIS else 1)


def _splits(config: ModelConfig, model: int, dtype: str | None) -> bool:
    try:
        check_mesh(config, AbstractMesh((model,), (MODEL_AXIS,)))
        weight_bytes(config, model, dtype)
    except ValueError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
