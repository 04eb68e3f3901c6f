"""Free memory, and the memory that live tensors take."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

RESERVE = 0.9  # share of the free memory that may be asked for


def free_bytes(device: str) -> float | None:
    """Bytes that can be allocated without swapping, None where the system does not say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    return free if free is None else float(free)


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process, or its peak with "VmHWM"; 0 where the system does not say."""
    return _field(Path("/proc/self/status"), field) or 0


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


class LiveBytes(TorchDispatchMode):
    """Mode that counts the bytes of live tensors, also of tensors without data; ``peak`` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage in self.known:
                continue
            self.known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size
