"""Training, and by name every other stage; needs ``pip install 'ercn[train]'``.

``from ercn.training import pretrain, train, evaluate, predict, export, ablate, select``: each takes its configuration
from ``ercn.config``. Evaluation and prediction do without Lightning.
"""

from __future__ import annotations

from ercn import _lazy

_MODULES = {
    "plan": "ercn.training.planning",
    "pretrain": "ercn.training.pretraining",
    "train": "ercn.training.fit",
    "train_ceiling": "ercn.training.ceiling",
    "evaluate": "ercn.evaluation.evaluating",
    "predict": "ercn.evaluation.predicting",
    "export": "ercn.export",
    "ablate": "ercn.ablation.runner",
    "select": "ercn.ablation.selection",
}
__all__ = list(_MODULES)
__getattr__ = _lazy.functions(__name__, _MODULES)
