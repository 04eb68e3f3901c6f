"""The table of backends: which launcher runs an op, in what order, and in a sentence why one cannot."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ercn.ops import cpu, cuda, reference, triton


@dataclass(frozen=True)
class Backend:
    """One row. The launcher has one function per op, ``unavailable()`` (why it cannot be used on this machine) and
    ``can_run(op, tensors)`` (why it cannot take these), each a sentence or None.

    automatic: whether it is chosen without being named; a row joins once measured and verified on its hardware.
    """

    name: str
    device: str
    launcher: ModuleType
    automatic: bool

    def can_run(self, op: str, tensors: tuple[Tensor, ...]) -> str | None:
        device = tensors[0].device.type
        if self.device not in ("any", device):
            return f"it runs on {self.device}, the tensors are on {device}"
        return self.launcher.unavailable() or self.launcher.can_run(op, tensors)


@dataclass(frozen=True)
class BackendStatus:
    """What ``backends()`` tells of one row: reason is None where the backend can be used on this machine."""

    name: str
    device: str
    automatic: bool
    reason: str | None


# In the order in which they are tried.
TABLE: tuple[Backend, ...] = (
    Backend("cpu", "cpu", cpu, automatic=True),
    Backend("cuda", "cuda", cuda, automatic=False),
    Backend("triton", triton.DEVICE, triton, automatic=False),
    Backend("reference", "any", reference, automatic=True),
)

_override: contextvars.ContextVar[str] = contextvars.ContextVar("ercn_backend", default="")


def names() -> list[str]:
    return [backend.name for backend in TABLE]


def _known(name: str, source: str) -> str:
    if name not in names():
        raise ValueError(f"{source} is {name!r}; backends are {', '.join(names())}")
    return name


def requested(backend: str = "") -> str:
    """The backend asked for: by argument, else ``use_backend``, else ``ERCN_BACKEND``, else "" (automatic).

    Read when an op runs, not when it is traced, so a compiled graph follows the override in force at the call.
    """
    if backend:
        return _known(backend, "backend")
    if override := _override.get():
        return override
    name = os.environ.get("ERCN_BACKEND", "")
    return _known(name, "ERCN_BACKEND") if name else ""


def launch(op: str, backend: str, *args):
    """Run ``op`` on the named backend, or on the first automatic one that can. Tensors come first in ``args``."""
    tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
    if name := requested(backend):
        row = next(row for row in TABLE if row.name == name)
        if reason := row.can_run(op, tensors):
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
    else:
        row = next(row for row in TABLE if row.automatic and row.can_run(op, tensors) is None)
    return getattr(row.launcher, op)(*args)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every ercn op runs on the backend ``name``; a backend that cannot run raises its reason.

    An explicit ``backend=`` argument is stronger, the environment variable ``ERCN_BACKEND`` weaker.

    >>> import torch, ercn.ops
    >>> with ercn.ops.use_backend("reference"):
    ...     ercn.ops.relu_affinity(torch.ones(1, 1, 2), torch.ones(1, 3, 2))
    tensor([[[6., 6.]]])
    """
    token = _override.set(_known(name, "use_backend's name"))
    try:
        yield
    finally:
        _override.reset(token)


def backends() -> list[BackendStatus]:
    """Every backend in the order in which it is tried, with the reason where it cannot be used here.

    >>> import ercn.ops
    >>> [b.name for b in ercn.ops.backends() if b.reason is None and b.device == "any"]
    ['reference']
    """
    return [BackendStatus(b.name, b.device, b.automatic, b.launcher.unavailable()) for b in TABLE]
