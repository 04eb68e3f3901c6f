"""The whole network as a case: inference and a training step, with our operators or with eager ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from ercn._memory import LiveBytes
from ercn.benchmarks import eager, memory
from ercn.benchmarks.cases import DTYPES, SEED, Inputs, ModelCase
from ercn.config import LossConfig, ModelConfig
from ercn.ops import use_backend

EAGER = "eager"
# The whole method, also what the defaults leave out: the affinity on the CAM's grid, three losses of two views.
MODEL = ModelConfig(refinement=("affinity",), refine_stride=0)
LOSS = LossConfig(er=0.1, ecr=1.0, consistency=0.1, transform="flip")


def obstacle(case: ModelCase, device: str) -> str | None:
    """Why the case cannot be measured here, in a sentence: every variant is judged by inference in float64."""
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        return "the network needs timm: pip install 'ercn[train]'"
    reason = memory.does_not_fit(2 * live_bytes(replace(case, direction="forward")), 0, device)
    return reason and f"inference in float64 {reason}"


def inputs(case: ModelCase, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Normal noise for pictures, and grades; the network's weights come from the same seed."""
    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=generator)
    grade = torch.arange(case.batch) % 5
    return Inputs((image.to(device, dtype), grade.to(device)), torch.ones((), device=device))


def arguments(case: ModelCase, inputs: Inputs) -> dict[str, tuple[Tensor | None, ...]]:
    """Arguments of the operators in the network, for maps of one pixel."""
    image, _ = inputs.tensors
    dtype, width = DTYPES[case.dtype], MODEL.embed_dim
    value, feat = image.new_zeros(1, 1, 1), image.new_zeros(1, width, 1, dtype=dtype)
    one = image.new_zeros(1, 1, dtype=dtype)
    pool = (one[None], one, one[0], one, one[0], one, one[0], None, None, None, 0.0, "tanh")
    return {"relu_affinity": (value, feat), "gated_attention_pool": pool}


def runner(case: ModelCase, inputs: Inputs, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """backend: one of ours, "" for the automatic choice, or ``EAGER``. Forward returns logits and refined CAM."""
    image, grade = inputs.tensors
    torch.manual_seed(SEED)
    model = _model(case).to(image.device, image.dtype, memory_format=torch.channels_last)
    return _step(case, model, image.contiguous(memory_format=torch.channels_last), grade, backend)


def _model(case: ModelCase) -> nn.Module:
    from ercn.grad_checkpointing import checkpoint_blocks
    from ercn.models import ERCN

    model = ERCN(replace(MODEL, backbone=case.backbone, output_stride=case.stride))
    if case.checkpointing:
        checkpoint_blocks(model.backbone)
    return model


def _step(case: ModelCase, model: nn.Module, image: Tensor, grade: Tensor, backend: str) -> Callable:
    from ercn.objective import ercn_loss

    transform = _transform(case.image_size, model.align_corners)
    half = case.dtype in ("bfloat16", "float16")

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        cast = torch.autocast(image.device.type, DTYPES[case.dtype]) if half else contextlib.nullcontext()
        with _operators(backend), cast:
            yield

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad(), scope():
            output = model(image)
        return output.logits, output.refined_cam

    def train() -> tuple[Tensor, ...]:
        with scope():
            loss, _ = ercn_loss(model, image, grade, model.config, LOSS, transform)
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    model.train(case.direction != "forward")
    return forward if case.direction == "forward" else train


@cache
def _transform(image_size: int, align_corners: bool) -> Callable[[Tensor], Tensor]:
    """The map between the two views of a step, from the seed."""
    from ercn.transforms import sample_transform

    generator = torch.Generator().manual_seed(SEED)
    with unset_fake_temporarily():  # it draws random numbers, which needs data
        return sample_transform(
            LOSS.transform, generator, rescale=LOSS.rescale, size=image_size, align_corners=align_corners
        )


@contextlib.contextmanager
def _operators(backend: str) -> Iterator[None]:
    if backend == EAGER:
        with (
            mock.patch("ercn.nn.affinity_propagate", eager.propagate),
            mock.patch("ercn.nn.gated_attention_pool", eager.gated_attention_pool),
        ):
            yield
    elif backend:
        with use_backend(backend):
            yield
    else:
        yield


@contextlib.contextmanager
def _without_data(case: ModelCase) -> Iterator[Callable]:
    """The step on tensors without data, in float32."""
    case = replace(case, dtype="float32")
    with FakeTensorMode():
        model = _model(case)
        yield _step(case, model, *inputs(case, "cpu").tensors, "reference")


@cache
def flops(case: ModelCase) -> int:
    """Counted by torch, the operators by their dense formulas."""
    with _without_data(case) as step, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@cache
def live_bytes(case: ModelCase) -> int:
    """The most that activations, gradients and temporaries of a call take at once, with blockwise operators.

    In float32, so more than autocast takes; kernels' own workspaces, about 100 MB on a CPU, come on top.
    """
    with _without_data(case) as step, LiveBytes() as live:
        step()
    return live.peak


@cache
def min_bytes(case: ModelCase) -> int:
    """Pictures and weights read once, and in training as many gradients written."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in _model(case).parameters())
    copies = 1 if case.direction == "forward" else 2
    return (case.batch * 3 * case.size + copies * parameters) * 4
