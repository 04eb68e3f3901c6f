"""Metrics and localization of trained networks, and predictions of any pictures."""

from __future__ import annotations

from ercn import _lazy

_MODULES = {
    "evaluate": "ercn.evaluation.evaluating",
    "predict": "ercn.evaluation.predicting",
}
__all__ = list(_MODULES)
__getattr__ = _lazy.functions(__name__, _MODULES)
