"""The forward passes of evaluation and prediction: plain torch, one device, every picture once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ercn.config import ModelConfig
from ercn.models import ERCN, grade_probabilities
from ercn.training.maps import heat_maps


def pick_device(accelerator: str) -> torch.device:
    """"auto" takes a GPU where there is one; else "cpu", "gpu", "cuda" or "mps"."""
    if accelerator == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    name = "cuda" if accelerator == "gpu" else accelerator
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"accelerator must be auto, cpu, gpu, cuda or mps, not {accelerator!r}")
    if name != "cpu" and not getattr(torch.backends if name == "mps" else torch, name).is_available():
        raise ValueError(f"accelerator {accelerator!r} was asked for, but torch finds none here")
    return torch.device(name)


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


def with_progress(items: Sequence[Any] | Any, title: str, wanted: bool) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True), total=len(items))
