"""Pre-training, training, evaluation, prediction, export, ablation and selection; needs ``pip install 'ercn[train]'``.

``from ercn.training import pretrain, train, evaluate, predict, export, ablate, select``: each takes its configuration
from ``ercn.config``.
"""

from __future__ import annotations

from importlib import import_module

_MODULES = {
    "plan": "planning",
    "pretrain": "pretraining",
    "train": "fit",
    "evaluate": "evaluation",
    "predict": "prediction",
    "export": "exporting",
    "ablate": "ablation",
    "select": "selection",
    "train_ceiling": "ceiling",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """Imports a function's file when it is asked for: evaluation and prediction do without Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
