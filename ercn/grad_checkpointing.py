"""Gradient checkpointing of a backbone: the backward pass recomputes its blocks instead of keeping activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(backbone: nn.Module) -> int:
    """Keeps only the inputs of ``backbone``'s blocks for the backward pass; returns the number of blocks.

    Memory falls from all activations to the blocks' inputs and one block's activations, for a second forward pass of
    each block. Outputs, gradients and running statistics do not change, to the bit where the kernels are deterministic.
    Names and state dict stay.

    timm's ``set_grad_checkpointing`` of a feature extractor would keep the whole last stage, the largest one at output
    stride 8, recompute the others a stage at a time, and let BatchNorm count every batch twice.

    Raises:
        ValueError: no blocks were found.

    >>> from ercn.models import create_backbone
    >>> checkpoint_blocks(create_backbone("resnet18", 32))
    8
    """
    blocks = list(_blocks(backbone))
    if not blocks:
        raise ValueError(f"run.grad_checkpointing: {type(backbone).__name__} has no blocks that could be recomputed")
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)
    return len(blocks)


def _checkpointed(block: nn.Module, forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    forward = partial(forward, **kwargs)
    if torch.compiler.is_compiling():  # the compiler recomputes values only, no updates of buffers
        return checkpoint(forward, *args, use_reentrant=False)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block)))


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Recomputes BatchNorm with momentum 0: the running statistics are saved for the backward pass but do not move."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that are siblings of one class and have children: residual blocks, mostly."""
    children = list(module.children())
    within = [block for child in children for block in _blocks(child)]
    if within:
        yield from within
    elif children and len({type(child) for child in children}) == 1 and all(any(c.children()) for c in children):
        yield from children
