"""The table of backends: which launcher runs an op, in what order, and in a sentence why one cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ercn.ops import cpu, cuda, reference, triton


@dataclass(frozen=True)
class Backend:
    """One row. The launcher has one function per op, ``unavailable()`` (why it cannot be used on this machine) and
    ``can_run(op, *args)`` (why it cannot take the op's own arguments, in its order), each a sentence or None.

    automatic: whether it is chosen without being named; a row joins once measured and verified on its hardware.
    """

    name: str
    device: str
    launcher: ModuleType
    automatic: bool

    def can_run(self, op: str, *args) -> str | None:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if self.device not in ("any", device):
            return f"it runs on {self.device}, the tensors are on {device}"
        return self.launcher.unavailable() or self.launcher.can_run(op, *args)


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

# The name in force of use_backend, or "". A plain global, since not every torch.compile can trace a context variable.
_override = ""


def named(name: str, source: str) -> Backend:
    """The row ``name``; ``source`` is who asked for it."""
    for row in TABLE:
        if row.name == name:
            return row
    raise ValueError(f"{source} is {name!r}; backends are {', '.join(row.name for row in TABLE)}")


def requested(backend: str | None) -> str:
    """What a public function hands to its op, and the op to its backward: the argument, else ``use_backend``'s name."""
    return backend or _override


def takes_cpu(backend: str) -> bool:
    """Whether ``launch`` would take the ``cpu`` row for tensors on the CPU, if that takes every argument of the op."""
    row = TABLE[0]
    if row.launcher is not cpu or cpu.unavailable() is not None:
        return False
    name = backend or os.environ.get("ERCN_BACKEND", "")
    return row.automatic if not name else name == row.name


def launch(op: str, backend: str, *args):
    """Run ``op`` on ``backend``, else on ``ERCN_BACKEND``, else on the first automatic row that can."""
    if name := backend or os.environ.get("ERCN_BACKEND", ""):
        row = named(name, "backend" if backend else "ERCN_BACKEND")
        if reason := row.can_run(op, *args):
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
    else:
        row = next(row for row in TABLE if row.automatic and row.can_run(op, *args) is None)
    return getattr(row.launcher, op)(*args)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every call of an ercn op takes the backend ``name``; one that cannot run raises its reason.

    The name is taken where the public function is called, and the backward of that call keeps it, wherever and whenever
    it runs. A compiled graph has it baked in and is compiled anew under another; an exported program keeps its own. It
    holds for every thread of the process, as torch's ``sdpa_kernel`` does. An explicit ``backend=`` argument is
    stronger, the environment variable ``ERCN_BACKEND``, read when an op runs, weaker. What ``torch.utils.checkpoint``
    computes again is a call of its own, with the name in force then.

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
    """Every backend in the order in which it is tried, with the reason where it cannot be used here.

    >>> import ercn.ops
    >>> [b.name for b in ercn.ops.backends() if b.reason is None and b.device == "any"]
    ['reference']
    """
    return [BackendStatus(b.name, b.device, b.automatic, b.launcher.unavailable()) for b in TABLE]
