"""What the device is: the one place that asks JAX."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The device a call is for. `num_cores` counts streaming multiprocessors, None if unknown."""

    platform: str
    kind: str
    num_cores: int | None

    @property
    def is_hopper(self) -> bool:
        """Whether this is an NVIDIA GPU of compute capability 9.0."""
        return bool(re.search(r"\b(H100|H200|H800|H20|GH200)\b", self.kind))

    def __str__(self) -> str:
        return f"{self.kind} ({self.platform})"


def current_device() -> Device:
    """The abstract mesh's device if one is set, else the default device.

    An abstract device lets a machine without a GPU trace and lower GPU kernels:

        mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
        with jax.sharding.use_abstract_mesh(mesh): ...
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Device(
            platform=abstract.platform, kind=abstract.device_kind, num_cores=abstract.num_cores
        )
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None:
        default = jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return Device(
        platform=default.platform,
        kind=default.device_kind,
        num_cores=getattr(default, "core_count", None),
    )
