"""Seeds: every draw of a training step is a function of (root seed, purpose, place), never of earlier draws.

So a run that was killed and resumed at an epoch's start repeats the uninterrupted run bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch

_PURPOSES = {"init": 0, "order": 1, "step": 2, "transform": 3, "shuffle": 4, "labels": 5}


def derive(seed: int, purpose: str, *place: int) -> int:
    """A 64-bit seed for ``purpose`` at ``place`` (epoch, step, rank …)."""
    return int(np.random.SeedSequence([seed, _PURPOSES[purpose], *place]).generate_state(1, np.uint64)[0])


def generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, *place))
