"""What one rank of a distributed test runs: single steps, for their gradients, and whole trainings; peak memory."""

import ctypes
import gc
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ercn._memory import resident_bytes
from ercn.config import DataConfig, LossConfig, ModelConfig, PretrainConfig, TrainConfig
from ercn.grad_checkpointing import checkpoint_blocks
from ercn.models import ERCN
from ercn.objective import ercn_loss
from ercn.training import train
from ercn.training.module import ERCNModule
from ercn.training.planning import PRECISIONS
from ercn.training.pretraining import Contrastive
from ercn.transforms import sample_transform

DATA = DataConfig(image_size=48)
KINDS = ("train", "simclr", "moco_v2")
STEPS = 2


class Step(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch, step):
        return self.module.training_step(batch, step)


def module_of(kind):
    torch.manual_seed(0)
    if kind == "train":
        config = TrainConfig(
            data=DATA,
            model=ModelConfig(backbone="test_resnet", embed_dim=8, pool_dim=8, refinement=("affinity",), detach=False),
            loss=LossConfig(transform="affine", ecr=1.0, consistency=0.1, min_pool=0.5),
        )
        return ERCNModule(ERCN(config.model), config, class_weight=torch.linspace(0.5, 2, 5)).double()
    config = PretrainConfig(data=DATA, backbone="test_resnet", method=kind, projection_dim=8, momentum=0.9)
    return Contrastive(config, 7).double()


def batches(kind):
    """The six pictures of each step."""
    generator = torch.Generator().manual_seed(1)
    shape = (6, 3, 48, 48) if kind == "train" else (6, 2, 3, 48, 48)
    for _ in range(STEPS):
        pictures = torch.randn(shape, generator=generator, dtype=torch.float64)
        grades = torch.randint(5, (6,), generator=generator)
        index = torch.randperm(8, generator=generator)[:6]  # some pictures repeat from the step before
        yield {"image": pictures, "grade": grades} if kind == "train" else {"views": pictures, "index": index}


def gradient(kind, rank=0, counts=(6,)):
    """Losses, logged losses weighted by their pictures, gradients, and MoCo's queue, of this rank's share."""
    world = len(counts)
    module = module_of(kind)
    module.trainer = SimpleNamespace(world_size=world, global_rank=rank, current_epoch=3)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()  # its statistics would be those of the rank's own pictures
    logged = []
    module.log = lambda name, value, batch_size, **_: logged.append(value * batch_size) if name == "loss" else None
    step = Step(module)
    if world > 1:
        step = DistributedDataParallel(step, find_unused_parameters=True)
    losses = []
    for i, whole in enumerate(batches(kind)):
        batch = {name: values.split(counts)[rank] for name, values in whole.items()}
        loss = step(batch if counts[rank] else None, i)
        loss.backward()
        losses.append(loss.detach())
    result = {"loss": torch.stack(losses), "logged": torch.stack(logged)}
    result["grad"] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    if kind == "moco_v2":
        result["queue"] = torch.cat([module.loss.keys, module.loss.pictures[:, None]], 1)
    return result


def save_gradients(rank, world, counts, folder):
    dist.init_process_group("gloo")
    for kind in KINDS:
        torch.save(gradient(kind, rank, counts), f"{folder}/{kind}-{rank}.pt")
    dist.destroy_process_group()


def train_until(rank, world, config, death):
    """A training run whose rank ``death[0]`` is killed at epoch and step ``death[1:]``, if given."""
    training_step = ERCNModule.training_step

    def step(self, batch, index):
        if (rank, self.current_epoch, index) == death:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, batch, index)

    ERCNModule.training_step = step
    train(config)


def save_peak(rank, world, config, path):
    """Writes the peak memory of two training steps, less what the libraries hold after small ones."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, as large tensors always do
    kwargs = config.model.backbone_kwargs
    small = replace(config.model, backbone_kwargs=kwargs | {"img_size": 64} if "img_size" in kwargs else kwargs)
    _two_steps(replace(config, model=small, data=replace(config.data, image_size=64, batch_size=1)))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    _two_steps(config)
    Path(path).write_text(str(resident_bytes("VmHWM") - before))


def _two_steps(config):
    dtype, half = PRECISIONS[config.run.precision]
    model = ERCN(config.model).to(dtype, memory_format=torch.channels_last).train()
    if config.run.grad_checkpointing:
        checkpoint_blocks(model.backbone)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)
    size = config.data.image_size
    transform = sample_transform(config.loss.transform, generator, size=size, align_corners=model.align_corners)
    for _ in range(2):
        image = torch.randn(config.data.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        grade = torch.arange(config.data.batch_size) % 5
        with torch.autocast("cpu", half) if half else nullcontext():
            loss, _ = ercn_loss(model, image, grade, config.model, config.loss, transform)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
