"""The forward passes of evaluation and prediction: plain torch, one device, every picture once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ercn.config import ModelConfig
from ercn.models import ERCN, grade_probabilities
from ercn.training.maps import heat_maps

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def pick_device(accelerator: str) -> torch.device:
    """"cpu"; "gpu" or "cuda"; "auto" is CUDA where there is one, else the CPU. The operators have no other devices."""
    if accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator must be one of {', '.join(ACCELERATORS)}; got {accelerator!r}")
    found = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not found:
        raise ValueError(f"accelerator {accelerator!r} was asked for, but torch finds none here")
    return torch.device("cuda" if found and accelerator != "cpu" else "cpu")


@torch.inference_mode()
def forward(
    model: ERCN, config: ModelConfig, batches: Iterable[dict[str, Tensor] | None], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], np.ndarray, dict[str, Tensor]]]:
    """Per batch: the batch, probabilities [B, K] (float64, rows sum to 1) and heat maps {name: [B, h, w] in [0, 1]}."""
    model.to(device).eval()
    for batch in batches:
        if batch is None:
            continue
        output = model(batch["image"].to(device, non_blocking=True))
        probability = grade_probabilities(output.logits.cpu().double(), config).numpy()
        yield batch, probability, heat_maps(output, config)
