"""The table of backends: which launchers can run an op, in which order, and why one cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from ercn.ops import cpu, cuda, reference, triton


@dataclass(frozen=True)
class Backend:
    """One row. The launcher is a module with a function for each op, ``unavailable()`` (why it cannot be used on this
    machine) and ``can_run(op, *args)`` (why it cannot take these arguments of the op); both return a sentence or None.

    automatic: whether it is chosen without being named, which needs measurements and tests on its hardware.
    """

    name: str
    device: str
    launcher: ModuleType
    automatic: bool

    def can_run(self, op: str, *args: Any) -> str | None:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if self.device not in ("any", device):
            return f"it runs on {self.device}, the tensors are on {device}"
        reason: str | None = self.launcher.unavailable() or self.launcher.can_run(op, *args)
        return reason


@dataclass(frozen=True)
class BackendStatus:
    """A row of ``backends()``; reason is None if the backend can be used on this machine, else a sentence."""

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

# The name that use_backend set, or "". A global, since torch.compile cannot trace a context variable in every version.
_override = ""


def named(name: str, source: str) -> Backend:
    """The row ``name``; ``source`` says in the error where the name comes from."""
    for row in TABLE:
        if row.name == name:
            return row
    raise ValueError(f"{source} is {name!r}; backends are {', '.join(row.name for row in TABLE)}")


def requested(backend: str | None) -> str:
    """The backend that a public function passes to its op, and the op to its backward: the argument, else the name of
    ``use_backend``, else ""."""
    return backend or _override


def takes_cpu(backend: str) -> bool:
    """Whether ``launch`` would take the ``cpu`` row for CPU tensors, if it takes all arguments of the op."""
    row = TABLE[0]
    if row.launcher is not cpu or cpu.unavailable() is not None:
        return False
    name = backend or os.environ.get("ERCN_BACKEND", "")
    return row.automatic if not name else name == row.name


def launch(op: str, backend: str, *args: Any) -> Any:
    """Run ``op`` on ``backend``, else on ``ERCN_BACKEND``, else on the first automatic row that can run it."""
    if name := backend or os.environ.get("ERCN_BACKEND", ""):
        row = named(name, "backend" if backend else "ERCN_BACKEND")
        if reason := row.can_run(op, *args):
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
    else:
        row = next(row for row in TABLE if row.automatic and row.can_run(op, *args) is None)
    return getattr(row.launcher, op)(*args)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call of an ercn op within the block on the backend ``name``; if that cannot run, the call raises why.

    The name is read when the public function is called, and the backward of that call keeps it, also after the block.
    A compiled graph contains the name and is compiled again under another one; an exported program keeps its own. It
    holds for all threads of the process, as torch's ``sdpa_kernel`` does. An explicit ``backend=`` argument takes
    precedence; the environment variable ``ERCN_BACKEND``, read when an op runs, applies only without either. The
    recomputation of ``torch.utils.checkpoint`` is a new call and reads the name again.

    Raises:
        ValueError: an unknown backend.

    >>> import torch, ercn.ops
    >>> with ercn.ops.use_backend("reference"):
    ...     ercn.ops.relu_affinity(torch.ones(1, 1, 2), torch.ones(1, 3, 2))
    tensor([[[6., 6.]]])
    """
    global _override
    before, _override = _override, named(name, "use_backend's name").name
    try:
        yield
    finally:
        _override = before


def backends() -> list[BackendStatus]:
    """Every backend in the order in which it is tried, with the reason if it cannot be used on this machine.

    >>> import ercn.ops
    >>> [b.name for b in ercn.ops.backends() if b.reason is None and b.device == "any"]
    ['reference']
    """
    return [BackendStatus(b.name, b.device, b.automatic, b.launcher.unavailable()) for b in TABLE]
