"""AdamW with linear warm-up and cosine decay, by optimizer step."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch

from ercn.config import RunConfig


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: (step + 1) / warmup up to 1, then half a cosine that reaches 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def adamw(module: pl.LightningModule, run: RunConfig) -> dict[str, Any]:
    """What ``configure_optimizers`` returns. Biases and norms (1-d parameters) get no weight decay.

    The schedule is a function of the step alone, so a run that is resumed with more epochs follows the longer cosine.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.lr)
    total = int(module.trainer.estimated_stepping_batches)
    warmup = round(total * min(1.0, run.warmup_epochs / max(1, run.epochs)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
