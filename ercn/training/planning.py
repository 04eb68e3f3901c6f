"""Peak memory of a training run, predicted from its configuration alone, and what to change when it does not fit."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ercn._memory import RESERVE, LiveBytes, free_bytes, resident_bytes
from ercn.config import PlanConfig, TrainConfig
from ercn.evaluation.infer import pick_device
from ercn.grad_checkpointing import checkpoint_blocks
from ercn.models import ERCN
from ercn.objective import ercn_loss, reads_refined
from ercn.training.run_folder import processes
from ercn.transforms import Flip, Identity, Rescale, Transform

# Lightning's names: dtype of the weights, and of autocast where there is one.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "64-true": (torch.float64, None),
    "16-true": (torch.float16, None),
    "bf16-true": (torch.bfloat16, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device at the peak of a training step, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int
    scratch: int

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


EXPLAINED = {
    "weights": "parameters and running statistics",
    "gradients": "of all parameters",
    "optimizer": "AdamW's two moments",
    "average": "run.ema",
    "buckets": "gradients on their way to the other devices",
    "activations": "pictures, what the backward pass needs, temporaries",
    "scratch": "workspace of the affinity's backward pass",
}


def footprint(config: TrainConfig) -> Footprint:
    """Runs one training step on tensors without data and counts the bytes that are alive at once.

    Both views, the losses, autocast, gradient checkpointing and accumulation run as in training. Memory that a kernel
    allocates for itself is not seen, except for the affinity's workspace, which a formula adds. A compiled network
    takes less; libraries and cuDNN's workspaces come on top. Takes seconds, and memory for no tensor.

    Raises:
        ValueError: ``run.precision`` is none of ``PRECISIONS``, or ``ercn train`` refuses the configuration, too.
    """
    run, data = config.run, config.data
    if run.precision not in PRECISIONS:
        raise ValueError(f"run.precision must be one of {', '.join(PRECISIONS)}; got {run.precision!r}")
    dtype, half = PRECISIONS[run.precision]
    cast = torch.autocast("cpu", half) if half else nullcontext()
    with _default_dtype(dtype), torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = ERCN(replace(config.model, pretrained=False)).train()
    with _default_dtype(dtype), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _onto_the_cpu(model)
        if run.grad_checkpointing:
            checkpoint_blocks(model.backbone)
        weights = live.now
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in parameters)
        for p in parameters:  # Lightning frees the last step's gradients after the forward pass
            p.grad = torch.zeros_like(p)
        image = torch.zeros(data.batch_size, 3, data.image_size, data.image_size)
        grade = torch.zeros(data.batch_size, dtype=torch.int64)
        with cast:
            loss, _ = ercn_loss(model, image, grade, config.model, config.loss, _largest(config))
        if run.accumulate == 1:
            model.zero_grad()
        loss.backward()
        step = live.peak
    devices, nodes = processes(run)
    grid = config.model.patch or config.model.refine_stride or config.model.output_stride
    elements = data.batch_size * (data.image_size // grid + 1) ** 2  # at most
    affinity = "affinity" in config.model.refinement and reads_refined(config.loss, config.loss.transform == "none")
    copies = 2 if affinity else 0  # of the pixel embedding, in float32
    return Footprint(
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        average=weights if run.ema else 0,
        buckets=gradients if devices * nodes > 1 else 0,
        activations=max(step - weights - gradients, gradients),  # the optimizer's step copies the gradients
        scratch=copies * 4 * elements * config.model.embed_dim,
    )


def _largest(config: TrainConfig) -> Transform:
    """A map A of largest memory: all that do not shrink the picture take the same."""
    kind = config.loss.transform
    return {"none": Identity(), "rescale": Rescale(config.loss.rescale)}.get(kind, Flip(3))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _onto_the_cpu(model: nn.Module) -> None:
    """Replaces tensors on the meta device by fake ones on the CPU: timm's networks cannot be built in fake mode."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(x.shape, dtype=x.dtype))


@dataclass(frozen=True)
class Change:
    """Changed options by name, and the configuration and its footprint after these and all earlier changes."""

    options: dict[str, object]
    config: TrainConfig
    footprint: Footprint


def changes(config: TrainConfig, fits: Callable[[Footprint], bool]) -> list[Change]:
    """Changes that make a configuration fit, one after the other, those that alter the training least first.

    Gradient checkpointing; half the batch and twice the steps per update, down to one picture; bfloat16; output stride
    16; smaller pictures. Ends with the first that fits, or when no change saves memory.
    """
    made: list[Change] = []
    now = footprint(config)
    for smaller in (_checkpointing, _smaller_batch, _half_precision, _coarser_map, _smaller_picture):
        while options := smaller(config):
            changed = _changed(config, options)
            try:
                then = footprint(changed)
            except ValueError:  # the backbone does not take it
                break
            if then.peak >= now.peak:
                break
            config, now = changed, then
            made.append(Change(options, config, now))
            if fits(now):
                return made
    return made


def _changed(config: TrainConfig, options: dict[str, object]) -> TrainConfig:
    for name, value in options.items():
        part, field = name.split(".")
        config = replace(config, **{part: replace(getattr(config, part), **{field: value})})
    return config


def _checkpointing(config: TrainConfig) -> dict[str, object]:
    return {} if config.run.grad_checkpointing else {"run.grad_checkpointing": True}


def _smaller_batch(config: TrainConfig) -> dict[str, object]:
    size, steps = config.data.batch_size, config.run.accumulate
    return {"data.batch_size": size // 2, "run.accumulate": round(steps * size / (size // 2))} if size > 1 else {}


def _half_precision(config: TrainConfig) -> dict[str, object]:
    return {"run.precision": "bf16-mixed"} if config.run.precision == "32-true" else {}


def _coarser_map(config: TrainConfig) -> dict[str, object]:
    return {"model.output_stride": 16} if config.model.output_stride < 16 else {}


def _smaller_picture(config: TrainConfig) -> dict[str, object]:
    kwargs = config.model.backbone_kwargs
    stride = math.lcm(32, config.model.output_stride)
    if isinstance(kwargs.get("img_size"), int):  # a network that is built for a size
        size = kwargs["img_size"] * 3 // 4 // stride * stride
        options = {"data.image_size": size, "model.backbone_kwargs": {**kwargs, "img_size": size}}
        return options if size >= 192 and not config.model.patch else {}
    step, corners = math.lcm(stride, config.model.patch or 1), not config.model.patch  # a picture of whole patches
    size = config.data.image_size * 3 // 4 // step * step + corners
    return {"data.image_size": size} if size >= 192 else {}


def advice(config: TrainConfig) -> str:
    """For a run that ran out of memory: how much a step needs, and which options make it fit the device."""
    now, memory = footprint(config), available(config) or 0.0
    text = f"a training step needs about {_gb(now.peak)} by prediction, and {_gb(memory)} are there"
    if now.peak <= RESERVE * memory:
        return f"{text}; something else takes it or limits it (ulimit, a container)"
    made = changes(config, lambda one: one.peak <= RESERVE * memory)
    if not made or made[-1].footprint.peak > RESERVE * memory:
        return f"{text}; no smaller batch, picture or precision fits: take a smaller model.backbone or a larger device"
    options = {name: value for change in made for name, value in change.options.items()}
    return f"{text}; {_gb(made[-1].footprint.peak)} with {_spelled(options)}"


def _spelled(options: dict[str, object]) -> str:
    def spelled(value: object) -> str:
        return shlex.quote(json.dumps(value)) if isinstance(value, dict) else str(value).lower()

    return " ".join(f"--{name} {spelled(value)}" for name, value in options.items())


def available(config: TrainConfig) -> float | None:
    """Bytes for a run on its device: all of a GPU's; on the CPU those that are free or held by this process."""
    if pick_device(config.run.accelerator).type == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    free = free_bytes("cpu")
    return None if free is None else free + resident_bytes()


def plan(config: PlanConfig) -> int:
    """Prints the predicted peak memory of ``ercn train`` with these options, part by part, and changes to make it fit.

    Returns 0 where it fits into ``memory`` GB (by default, those of this machine), 1 where it does not.
    """
    memory = config.memory * 1e9 if config.memory else available(config)
    now = footprint(config)
    width = max(map(len, EXPLAINED))
    for name, size in vars(now).items():
        if size:
            print(f"  {name:<{width}}  {_gb(size):>9}  {EXPLAINED[name]}")
    print(f"  {'peak':<{width}}  {_gb(now.peak):>9}  on each device")
    if memory is None:
        print("this system does not say how much memory is free: give --memory GB")
        return 0
    fits = now.peak <= RESERVE * memory
    print(f"{'fits' if fits else 'does not fit'} into {_gb(memory)}, of which {RESERVE:.0%} are planned with")
    if fits:
        return 0
    for change in changes(config, lambda one: one.peak <= RESERVE * memory):
        verdict = "fits" if change.footprint.peak <= RESERVE * memory else "does not fit"
        print(f"  {_gb(change.footprint.peak):>9}  {verdict:<12}  with {_spelled(change.options)}")
    return 1


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
