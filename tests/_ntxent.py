"""One rank's part of a distributed contrastive gradient; its own file, so that a spawned process imports little."""

import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss


def contrastive_gradient(rank, world, weight, views, folder):
    """Saves loss and gradient, averaged over ranks as DistributedDataParallel does, of views [2, B, M] @ weight."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    weight = weight.clone().requires_grad_()
    first, second = (view.chunk(world)[rank] @ weight for view in views)
    loss = NTXentLoss(0.5, gather_distributed=True)(first, second)
    loss.backward()
    mean = torch.stack([loss.detach(), *weight.grad.flatten()]) / world
    dist.all_reduce(mean)
    if rank == 0:
        torch.save(mean, f"{folder}/gradient.pt")
    dist.destroy_process_group()
