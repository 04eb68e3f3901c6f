"""Grids of configurations and seeds: what each part brings, and which to choose."""

from __future__ import annotations

from ercn import _lazy

_MODULES = {
    "ablate": "ercn.ablation.runner",
    "select": "ercn.ablation.selection",
}
__all__ = list(_MODULES)
__getattr__ = _lazy.functions(__name__, _MODULES)
