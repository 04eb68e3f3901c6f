"""Grids of configurations and seeds: what each part brings, and which to choose.

grid.py       the YAML file of rows, and the cells that they make
runner.py     ``ablate``: trains and evaluates the cells
table.py      their table, with bootstrap intervals
selection.py  ``select``: the best row on validation
"""

from __future__ import annotations

from ercn import _lazy

_MODULES = {
    "ablate": "ercn.ablation.runner",
    "select": "ercn.ablation.selection",
}
__all__ = list(_MODULES)
__getattr__ = _lazy.functions(__name__, _MODULES)
