"""Public functions of a package whose modules are imported at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def functions(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of ``package``. modules: name of each function to its module."""

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return find
