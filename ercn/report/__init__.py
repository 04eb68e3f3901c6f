"""Pages, tables, pictures and model cards of runs."""

from __future__ import annotations

from ercn import _lazy

_MODULES = {
    "report": "ercn.report.page",
}
__all__ = list(_MODULES)
__getattr__ = _lazy.functions(__name__, _MODULES)
