"""What several processes need to act as one: everybody's rows, and a mean over everybody's pictures."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, [n_r, …] of rank r -> [Σ n_r, …] in the order of the ranks, which may have different n_r.

    Only a rank's own rows carry a gradient, and nothing is sent in the backward pass: where every rank computes the
    same loss of all rows, the sum of the ranks' gradients is its gradient. DistributedDataParallel averages them, so
    the loss is to be multiplied by ``world()``.
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


def mean_share(loss: Tensor, count: int) -> Tensor:
    """A rank's mean over its ``count`` pictures, so that the average over ranks becomes the mean over all pictures."""
    if world() == 1:
        return loss
    total = loss.new_tensor(count)
    dist.all_reduce(total)
    return loss * (world() * count / total.clamp(min=1))
