"""Functions of a package whose files are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def functions(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of ``package``: the function of a name comes from the module beside it."""

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return find
