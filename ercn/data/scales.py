"""Grade scales, and the common scale on which a model of one scale is tested on data of another.

A scale of diabetic retinopathy (DR) cuts the five levels of the International Clinical DR scale (ICDR: 0 none, 1 mild,
2 moderate, 3 severe, 4 proliferative) into classes; a cut c says that a class begins at level c:

    ICDR                          cuts 1 2 3 4
    Davis, modified               cuts 1 3 4      NDR = 0, SDR = 1 and 2, PPDR = 3, PDR = 4
    referable DR, trained on ICDR cut 2           moderate or worse
    referable DR, trained on Davis cut 3          PPDR or worse, so severe or worse

The common scale of two scales has the cuts that both have. Davis' SDR holds mild and moderate together, so "moderate or
worse" is no class of it.

Source: Takahashi et al. 2017, PLoS ONE 12(6):e0179790, for the modified Davis scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ercn.data.entries import ICDR

DAVIS = ("NDR", "SDR", "PPDR", "PDR")
BINARY = ("not referable", "referable")
_CUTS = {ICDR: (1, 2, 3, 4), DAVIS: (1, 3, 4)}


@dataclass(frozen=True)
class Scale:
    """names: of the classes. cuts: level at which each class but the first begins. levels: whose levels these are."""

    names: tuple[str, ...]
    cuts: tuple[int, ...]
    levels: tuple[str, ...]

    def to(self, common: Scale) -> np.ndarray:
        """Class of ``common``, whose cuts are among these, for each class: int [K]."""
        return np.searchsorted(common.cuts, (0, *self.cuts), side="right")

    def __str__(self) -> str:
        return f"{', '.join(self.names)} (beginning at {', '.join(self.levels[cut] for cut in self.cuts)})"


@dataclass(frozen=True)
class CommonGround:
    """model, data: their own scales. scale: the common one, on which both are compared."""

    model: Scale
    data: Scale
    scale: Scale

    def probability(self, probability: np.ndarray) -> np.ndarray:
        """The model's probabilities [N, K] summed over the classes that the common scale joins: [N, K']."""
        return probability @ np.eye(len(self.scale.names))[self.model.to(self.scale)]

    def truth(self, grade: np.ndarray) -> np.ndarray:
        """The data set's grades [N] as classes of the common scale."""
        return self.data.to(self.scale)[grade]


def scale_of(class_names: Sequence[str], targets: str = "ordinal") -> Scale:
    """The ICDR or Davis scale where the names match, else one of these classes; its [class >= 2] if "referable"."""
    names = tuple(class_names)
    scale = Scale(names, _CUTS[names], ICDR) if names in _CUTS else Scale(names, tuple(range(1, len(names))), names)
    binary = targets == "referable" and len(scale.cuts) > 1
    return Scale(BINARY, (scale.cuts[1],), scale.levels) if binary else scale


def common_ground(trained: Sequence[str], targets: str, found: Sequence[str], dataset: str) -> CommonGround:
    """The finest scale on which a model can be compared with a data set.

    trained: class names of the data set that the model was trained on, with ``targets`` of ``ModelConfig``. found:
    class names of the data set ``dataset``. Where one side's classes are only numbered ("0", "1", …, as a CSV file
    gives them), the other side's names hold. Raises ValueError naming both scales where they have no cut in common.
    """
    if _numbered(found) and len(found) <= len(trained):
        found = trained
    elif _numbered(trained) and len(found) == len(trained):
        trained = found
    model, data = scale_of(trained, targets), scale_of(found)
    cuts = tuple(cut for cut in model.cuts if cut in data.cuts) if model.levels == data.levels else ()
    if not cuts:
        raise ValueError(f"no common grades: the model tells {model}, but data set {dataset} has {data}")
    names = next(scale.names for scale in (data, model) if scale.cuts == cuts)
    return CommonGround(model, data, Scale(names, cuts, model.levels))


def _numbered(names: Sequence[str]) -> bool:
    return all(name.isdigit() for name in names)
