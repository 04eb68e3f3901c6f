"""What memory is free, and what tensors take while they live."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

RESERVE = 0.9  # of the free memory may be asked for


def free_bytes(device: str) -> float | None:
    """What can be allocated without swapping, None where the system does not say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive while it is on; ``peak`` is the most. They may be without data."""

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
