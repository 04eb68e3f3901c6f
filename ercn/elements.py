"""Where the elements of a feature map lie in the picture: the one place that knows, for models, losses, maps, overlays.

A network of odd kernels with stride 2, padded by half, sees with element i of n the pixel i · stride: the outer
elements lie on the centres of the outer pixels, where the side is stride · (n - 1) + 1 ("aligned corners"). A network
that cuts the picture into patches sees with element i the cell [i · stride, (i + 1) · stride). Both are symmetric about
the picture's centre, so that flips and quarter turns of the picture turn the map; any other side is resized to the
nearest such one first (``exact_side``). All resizing of pictures and maps then is bilinear with or without
``align_corners``, and nothing moves.

What is not symmetric is mended or refused when a backbone is built (``symmetrize``, ``aligned_corners``): average pools
of 2 × 2, as in the shortcuts of "d" ResNets, lie half an element off and become binomial ones; a backbone whose
gradients are still not symmetric is none for that output stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

GEOMETRY = 3  # version of the above that exports carry; 1: maps drawn as cells of unmended backbones; 2: patches as cut


class BinomialPool(nn.Module):
    """[1, 2, 1] ⊗ [1, 2, 1] / 16 with a stride, edges repeated: the symmetric kin of a 2 × 2 average.

    [B, C, h, w] -> [B, C, ⌈h / stride⌉, ⌈w / stride⌉], the grid of a 3 × 3 convolution of that stride.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False), 2, self.stride)


def symmetrize(backbone: nn.Module) -> nn.Module:
    """The backbone, 2 × 2 average pools replaced in place by ``BinomialPool`` of their stride; no weights change."""

    def replacement(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.AvgPool2d) or _pair(module.kernel_size) != (2, 2):
            return None
        return BinomialPool(_pair(module.stride)[0])

    _replace(backbone, replacement)
    return backbone


def aligned_corners(build: Callable[[], nn.Module], stages: Callable[[nn.Module, Tensor], list[Tensor]]) -> bool | None:
    """Whether the outer elements of the last stages lie on the outer pixels (True) or inside cells (False).

    Measured on a network whose kernels are constant and whose other layers are linear: the gradient of the middle
    element with respect to a picture of 3 elements a side is then symmetric about the picture's centre to rounding, for
    sides of 2 · stride + 1 where corners are aligned and 3 · stride where elements are cells. None where neither is so.
    Networks that only take the size of their training (ViT, Swin) cut patches: False.

    Args:
        build: makes the network, untrained. Always called with data, on the CPU, in float32, whatever the caller's
            modes and default device and dtype are, and leaves torch's random state as it was.
        stages: gives its feature maps, [B, C, h, w] each.
    """
    dtype = torch.get_default_dtype()
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            return _aligned_corners(build().eval(), stages)
        finally:
            torch.set_default_dtype(dtype)


def _aligned_corners(probe: nn.Module, stages: Callable[[nn.Module, Tensor], list[Tensor]]) -> bool | None:
    if (getattr(probe, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return False
    stride = probe.feature_info.reduction()[-1]
    _replace(probe, _linear)
    for module in probe.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.fill_(1 / parameter[0].numel() if parameter.ndim > 1 else float("bias" not in name))
    for corners, side in ((True, 2 * stride + 1), (False, 3 * stride)):
        image = torch.ones(1, 3, side, side, requires_grad=True)
        try:
            maps = stages(probe, image)[-3:]
        except (AssertionError, RuntimeError):  # a size that it does not take
            continue
        if maps[-1].shape[-1] != 3 or corners and any(x.shape[-1] % 2 == 0 for x in maps):
            continue
        centres = [slice((x.shape[-1] - 1) // 2, x.shape[-1] // 2 + 1) for x in maps]  # one element, or two
        middle = [x[..., centre, centre].sum() for x, centre in zip(maps, centres)]
        grads = [torch.autograd.grad(y, image, retain_graph=True)[0] for y in middle]
        if all(torch.allclose(g, g.flip((2, 3)), rtol=1e-3, atol=1e-4 * float(g.abs().max())) for g in grads):
            return corners
    return None


def exact_side(side: int, stride: int, align_corners: bool) -> int:
    """The side next to ``side`` at which the map is exact: a multiple of the stride, plus 1 with aligned corners.

    >>> exact_side(512, 16, True), exact_side(513, 16, True), exact_side(500, 32, False)
    (513, 513, 512)
    """
    extra = int(align_corners)
    return stride * max(1, (2 * (side - extra) + stride) // (2 * stride)) + extra


def resize(x: Tensor, size: Sequence[int], align_corners: bool, *, antialias: bool = False) -> Tensor:
    """Bilinear: [B, C, h, w] of a picture or a map to [B, C, *size], every place where it was.

    antialias: where it shrinks by a factor r, weigh by a triangle of half width r what an element then stands for.
        (That of ``F.interpolate`` moves the picture where corners are aligned.)
    """
    if x.shape[-2:] == tuple(size):
        return x
    if not antialias or all(m >= n for n, m in zip(x.shape[-2:], size)):
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = (
        _triangles(n, m, align_corners, x.device).to(x.dtype) for n, m in zip(x.shape[-2:], size)
    )  # [m, n] each
    with torch.autocast(x.device.type, enabled=False):  # which would take these products in half precision
        return rows @ x @ columns.T


def _triangles(n: int, m: int, align_corners: bool, device: torch.device) -> Tensor:
    """Weights [m, n] float32, rows of sum 1, of n elements in each of m on the same span."""
    index = torch.arange(m, device=device)
    ratio = (n - 1) / max(1, m - 1) if align_corners else n / m
    place = index * ratio if align_corners else (index + 0.5) * ratio - 0.5
    weight = (1 - (place[:, None] - torch.arange(n, device=device)).abs() / max(1.0, ratio)).clamp_min(0)
    return weight / weight.sum(1, keepdim=True)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _linear(module: nn.Module) -> nn.Module | None:
    """What stands for a layer whose gradient is that of one pixel (maximum), or of differences (norm)."""
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    leaf = not any(True for _ in module.children())
    return nn.Identity() if leaf and "Norm" in type(module).__name__ else None


def _replace(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    for name, child in module.named_children():
        if (new := replacement(child)) is not None:
            setattr(module, name, new)
        else:
            _replace(child, replacement)
