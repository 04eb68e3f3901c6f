"""Triton kernels and their launchers; tile sizes are in ``table.py``. Nothing here registers an operator.

Kernels take NamedTuples: of tensors and sizes, and as ``tl.constexpr`` a row of the table. Code for an argument that is
None (a mask, a bias, an output) is not compiled. Fields of a compile-time tuple go to constexpr locals before they are
passed on or combined: Triton 3.6 needs that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def _kernels() -> Iterator[tuple[ModuleType, str, object]]:
    """Module, name and object of every kernel."""
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__:
                yield module, name, value


def _full_name(module: ModuleType, name: str) -> str:
    return f"{module.__name__.removeprefix(__name__ + '.')}.{name}"


def kernels() -> list[str]:
    """Names of all kernels: "affinity.forward_kernel" and so on."""
    return sorted(_full_name(module, name) for module, name, _ in _kernels())


@contextlib.contextmanager
def counting_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel within the block, compiled or interpreted."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str, kernel: object):
            self.name, self.kernel, self.fn = name, kernel, kernel.fn

        def __getitem__(self, grid):
            counts[self.name] += 1
            return self.kernel[grid]

    found = list(_kernels())
    for module, name, kernel in found:
        setattr(module, name, Counted(_full_name(module, name), kernel))
    try:
        yield counts
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)
