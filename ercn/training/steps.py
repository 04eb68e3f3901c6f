"""What the training steps of all stages share: memory layout, the optimizer's schedule, several processes as one."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from ercn.config import RunConfig
from ercn.evaluation.infer import pick_device
from ercn.grad_checkpointing import checkpoint_blocks


def set_up(module: pl.LightningModule, network: torch.nn.Module, run: RunConfig) -> None:
    """Applies ``run``'s options to ``network``, a part of ``module`` with a ``backbone``; weights keep their names."""
    if run.sync_batchnorm:
        if pick_device(run.accelerator).type == "cpu":
            raise ValueError("run.sync_batchnorm needs GPUs: torch has no such BatchNorm on the CPU")
        convert_sync_batchnorm(module)
    if run.grad_checkpointing:
        checkpoint_blocks(network.backbone)
    if run.channels_last:
        module.to(memory_format=torch.channels_last)
    if run.compile:
        network.compile()


def laid_out(image: Tensor, run: RunConfig) -> Tensor:
    """Pictures [B, C, H, W] in the memory layout that ``set_up`` gives the weights."""
    return image.contiguous(memory_format=torch.channels_last if run.channels_last else torch.contiguous_format)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: (step + 1) / warmup up to 1, then half a cosine that reaches 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def adamw(module: pl.LightningModule, run: RunConfig) -> dict[str, Any]:
    """Optimizer and schedule for ``configure_optimizers``; biases and norms (1-d parameters) get no weight decay.

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


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, [n_r, …] of rank r -> [Σ n_r, …] in the order of the ranks, which may have different n_r.

    Only a rank's own rows carry a gradient, and nothing is sent in the backward pass: where every rank computes the
    same loss of all rows, the sum of the ranks' gradients is its gradient. DistributedDataParallel averages them, so
    the loss must be multiplied by ``world()``.
    """
    if world() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    most = max(map(int, counts))
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[: int(count)] for part, count in zip(parts, counts)]
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def gather_objects(own: Any) -> list[Any]:
    """The objects of all ranks, in the order of the ranks."""
    every = [own] * world()
    if len(every) > 1:
        dist.all_gather_object(every, own)
    return every


def mean_share(loss: Tensor, count: int) -> Tensor:
    """A rank's mean over its ``count`` pictures, scaled so that the ranks' average is the mean over all pictures."""
    if world() == 1:
        return loss
    total = loss.new_tensor(count)
    dist.all_reduce(total)
    return loss * (world() * count / total.clamp(min=1))
