"""The registry: which implementations an operation has, and which one a call gets.

`backend=None` takes the first that runs on the present device; a name means that one or an error.
There is no silent fallback from a named backend.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.device import Device, current_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an operation.

    `unsupported(problem)` and `unfit(device)` give None, or the reason why not: the first is about
    shapes and dtypes and holds wherever the call is traced, the second about the device.
    `outrun(problem)` gives None, or why a backend behind this one is faster there.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[[Any], str | None] = lambda problem: None
    unfit: Callable[[Device], str | None] = lambda device: None
    outrun: Callable[[Any], str | None] = lambda problem: None


def needs_gpu(device: Device) -> str | None:
    """A `Backend.unfit` for kernels that run on GPUs only."""
    return None if device.platform in ("gpu", "cuda") else f"needs a GPU, this is a {device}"


# Every name that some operation uses. A name outside it is a typing error of the caller's; a name
# in it that an operation lacks is something that this operation cannot do.
KNOWN = ("mosaic_gpu", "megakernel", "triton", "reference")


def check_name(name: str | None) -> None:
    """ValueError for a backend that no operation has."""
    if name is not None and name not in KNOWN:
        raise ValueError(f"backend: got {name!r}, expected None or one of {', '.join(KNOWN)}")


def choose(op: str, backends: Sequence[Backend], problem: Any, name: str | None) -> Backend:
    """The backend `name` of `backends` (fastest first), or, for None, the first that can run.

    Errors: ValueError for a name nobody knows; NotImplementedError, with the reason, for one that
    cannot do `problem`.
    """
    if name is None:
        device = current_device()
        able = [b for b in backends if not (b.unfit(device) or b.unsupported(problem))]
        for backend in [*(b for b in able if b.outrun(problem) is None), *able]:
            return backend
        raise NotImplementedError(f"{op}: no backend can run {problem}; see explain()")
    check_name(name)
    for backend in backends:
        if backend.name == name:
            if reason := backend.unsupported(problem):
                raise NotImplementedError(f"backend {name!r} cannot run this {op}: {reason}")
            return backend
    raise NotImplementedError(
        f"backend {name!r} has no {op}: it has {', '.join(b.name for b in backends)}"
    )


def supports(backends: Sequence[Backend], problem: Any, name: str | None) -> bool:
    """Whether the backend `name` can do `problem`; None, which picks any, always can."""
    return name is None or any(
        backend.name == name and backend.unsupported(problem) is None for backend in backends
    )


def explain(backends: Sequence[Backend], problem: Any, device: Device) -> dict[str, str | None]:
    """For each backend, None if `problem` can run on `device`, else the reason why not."""
    return {b.name: b.unfit(device) or b.unsupported(problem) for b in backends}
