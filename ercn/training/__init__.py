"""Training, and by name every other stage; needs ``pip install 'ercn[train]'``.

``from ercn.training import pretrain, train, evaluate, predict, export, ablate, select``: each takes its configuration
from ``ercn.config``. Evaluation and prediction do without Lightning.

fit.py          ``train``: checks of the configuration, training, export of the best epoch
pretraining.py  ``pretrain``: SimCLR and MoCo v2
ceiling.py      ``train_ceiling``: the U-Net of lesion masks
module.py       training and validation step of ERCN; the loss itself is ``ercn/objective.py``
steps.py        for the steps of all three: memory layout, learning rate, several processes
loaders.py      order of the pictures and loaders
callbacks.py    metrics.csv, checkpoints, weight averaging
probing.py      kNN and linear probe of frozen features
run_folder.py   a run's folder, resuming, Lightning's trainer
planning.py     ``plan``: peak memory of a configuration
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ercn.ablation.runner import ablate as ablate
    from ercn.ablation.selection import select as select
    from ercn.evaluation.evaluating import evaluate as evaluate
    from ercn.evaluation.predicting import predict as predict
    from ercn.export import export as export
    from ercn.training.ceiling import train_ceiling as train_ceiling
    from ercn.training.fit import train as train
    from ercn.training.planning import plan as plan
    from ercn.training.pretraining import pretrain as pretrain

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


def __getattr__(name: str) -> Any:
    """Imports a function's file when it is asked for: evaluation and prediction need no Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
