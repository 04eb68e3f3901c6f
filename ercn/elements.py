"""Where the elements of a feature map lie in the picture; models, losses, maps and overlays ask here.

In a network of odd kernels with stride 2, padded by half, element i of n lies on pixel i · stride: the outer elements
lie on the centres of the outer pixels, where the side is stride · (n - 1) + 1 ("aligned corners"). In a network that
cuts the picture into patches, element i is the cell [i · stride, (i + 1) · stride). Both are symmetric about the
picture's centre, so that flips and quarter turns of the picture turn the map. A picture of another side is resized to
the nearest such side first (``exact_side``). All resizing of pictures and maps then is bilinear with or without
``align_corners``, and nothing moves.

A backbone that is not symmetric is corrected or refused when it is built (``symmetrize``, ``centre``,
``aligned_corners``). Average pools of 2 × 2, as in the shortcuts of "d" ResNets, lie half an element off and become
binomial pools. A network that cuts windows (MaxViT, CoAtNet) must have cells, so its strided kernels are centred on
cells. A backbone whose gradients are still not symmetric is refused for that output stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

# Version of the above, which exports carry. 1: maps are cells, backbones are not corrected; 2: patches are not resized;
# 3: networks of one picture size count as cells and are not corrected.
GEOMETRY = 4


# Values of the picture on which symmetry is measured. At the first, gates are nearly linear; at the second, a position
# code that is added to the features (EdgeNeXt) does not hide them.
LEVELS = 2.0**-10, 1.0


class BinomialPool(nn.Module):
    """[1, 2, 1] ⊗ [1, 2, 1] / 16 with a stride, edges repeated: the symmetric form of a 2 × 2 average.

    [B, C, h, w] -> [B, C, ⌈h / stride⌉, ⌈w / stride⌉], the grid of a 3 × 3 convolution of that stride.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False), 2, self.stride)


class CentredConv2d(nn.Conv2d):
    """A convolution of stride s, its odd kernel moved onto the middle of cells of s × s: k ⊗ [1, 1] ⊗ [1, 1] / 4.

    [B, C, h, w] -> [B, D, h / s, w / s] for sides that s divides, zeros beyond the edges. It shares the weights of the
    convolution that it replaces.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        arguments = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride
        super().__init__(*arguments, groups=conv.groups, bias=False, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = sum(F.pad(self.weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1)) / 4
        padding = (weight.shape[-1] - self.stride[0]) // 2
        return F.conv2d(x, weight, self.bias, self.stride, padding, 1, self.groups)


def centre(backbone: nn.Module) -> nn.Module:
    """Replaces strided convolutions of odd kernels by ``CentredConv2d``, in place; no weights change."""

    def replacement(module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Conv2d and type(module).__name__ != "Conv2dSame":  # timm's, which pads on one side
            return None
        (k, *kernel), (s, *stride) = _pair(module.kernel_size), _pair(module.stride)
        square = [k] == kernel and [s] == stride and _pair(module.dilation) == (1, 1)
        return CentredConv2d(module) if square and k % 2 and s % 2 == 0 and k + 1 >= s else None

    _replace(backbone, replacement)
    return backbone


def cuts_patches(backbone: nn.Module) -> bool:
    """Whether it is a ViT, whose elements are the patches that its first convolution cuts: cells without measuring."""
    proj = getattr(getattr(getattr(backbone, "model", None), "patch_embed", None), "proj", None)
    strides = {(stride, stride) for stride in backbone.feature_info.reduction()}
    return isinstance(proj, nn.Conv2d) and {proj.kernel_size, proj.stride} == strides and proj.padding == (0, 0)


def symmetrize(backbone: nn.Module) -> nn.Module:
    """Replaces 2 × 2 average pools by ``BinomialPool`` of their stride, in place; no weights change."""

    def replacement(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.AvgPool2d) or _pair(module.kernel_size) != (2, 2):
            return None
        return BinomialPool(_pair(module.stride)[0])

    _replace(backbone, replacement)
    return backbone


def aligned_corners(
    build: Callable[[int], nn.Module],
    stages: Callable[[nn.Module, Tensor], list[Tensor]],
    stride: int,
    own: int | None = None,
) -> bool | None:
    """Whether the outer elements of the last stages lie on the outer pixels (True) or inside cells (False).

    Measured on a network whose kernels are constant and whose other layers are linear: the gradient of the middle
    element with respect to a picture of 3 elements a side is then symmetric about the picture's centre to rounding, for
    sides of 2 · stride + 1 where corners are aligned and 3 · stride where elements are cells. Attention mixes elements
    but moves none; it is left out where it keeps the shape. None where neither holds.

    Args:
        build: makes the network for pictures of that side. It is called in float32 and without data, under any modes,
            default device and dtype of the caller, and torch's random state is kept; with data, on the CPU, where a
            network keeps more tensors than parameters and buffers.
        stages: gives the network's feature maps, [B, C, h, w] each.
        stride: input pixels per element of the last stage.
        own: the side that the network is made for, tried where it takes no other.
    """
    dtype = torch.get_default_dtype()
    with (
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            if _symmetric(build, stages, stride, 2 * stride + 1, True):
                return True
            cells = _symmetric(build, stages, stride, 3 * stride, False)
            if cells is None and own and own % stride == 0:
                cells = _symmetric(build, stages, stride, own, False)
            return False if cells else None
        finally:
            torch.set_default_dtype(dtype)


def _symmetric(build, stages, stride: int, side: int, corners: bool, device: str = "meta") -> bool | None:
    """Whether the gradients of the middle elements are symmetric; None where the network does not take that side."""
    try:
        with torch.device(device):
            probe = build(side).eval()
        _replace(probe, _linear)
        with torch.device("cpu"):
            _fill(probe)
            return any(_even(probe, stages, stride, side, corners, level) for level in LEVELS)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "meta" in str(error) and device == "meta":
            return _symmetric(build, stages, stride, side, corners, "cpu")
        return None


def _even(probe: nn.Module, stages, stride: int, side: int, corners: bool, level: float) -> bool:
    """Whether the gradients of the middle elements are symmetric on a picture of the value ``level``."""
    image = torch.full((1, 3, side, side), level, requires_grad=True)
    maps = stages(probe, image)[-3:]
    if maps[-1].shape[-1] != side // stride + corners or corners and any(x.shape[-1] % 2 == 0 for x in maps):
        return False
    centres = [slice((x.shape[-1] - 1) // 2, x.shape[-1] // 2 + 1) for x in maps]  # one element, or two
    middle = [x[..., centre, centre].sum() for x, centre in zip(maps, centres)]
    grads = [torch.autograd.grad(y, image, retain_graph=True)[0] for y in middle]
    errors = [((g - g.flip((2, 3))).abs() - 1e-3 * g.abs()).max() / g.abs().max() for g in grads]
    return all(bool(error <= 1e-4) for error in errors)  # NaN fails


def exact_side(side: int, stride: int, align_corners: bool) -> int:
    """The side next to ``side`` at which the map is exact: a multiple of the stride, plus 1 with aligned corners.

    >>> exact_side(512, 16, True), exact_side(513, 16, True), exact_side(500, 32, False)
    (513, 513, 512)
    """
    extra = int(align_corners)
    return stride * max(1, (2 * (side - extra) + stride) // (2 * stride)) + extra


def resize_exactly(image: Tensor, stride: int, align_corners: bool) -> Tensor:
    """The picture [B, C, H, W] at its ``exact_side``, each way."""
    return resize(image, [exact_side(side, stride, align_corners) for side in image.shape[-2:]], align_corners)


def resize(x: Tensor, size: Sequence[int], align_corners: bool, *, antialias: bool = False) -> Tensor:
    """Bilinear resizing of a picture or a map [B, C, h, w] to [B, C, *size]; no place moves.

    antialias: where it shrinks by a factor r, average with a triangle of half width r. (The antialiasing of
        ``F.interpolate`` moves the picture where corners are aligned.)
    """
    if x.shape[-2:] == tuple(size):
        return x
    if not antialias or all(m >= n for n, m in zip(x.shape[-2:], size)):
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = (
        _triangles(n, m, align_corners, x.device).to(x.dtype) for n, m in zip(x.shape[-2:], size)
    )  # [m, n] each
    with torch.autocast(x.device.type, enabled=False):  # autocast would take these products in half precision
        return rows @ x @ columns.T


def _triangles(n: int, m: int, align_corners: bool, device: torch.device) -> Tensor:
    """Weights [m, n] float32 that resize n elements to m on the same span; rows sum to 1."""
    index = torch.arange(m, device=device)
    ratio = (n - 1) / max(1, m - 1) if align_corners else n / m
    place = index * ratio if align_corners else (index + 0.5) * ratio - 0.5
    weight = (1 - (place[:, None] - torch.arange(n, device=device)).abs() / max(1.0, ratio)).clamp_min(0)
    return weight / weight.sum(1, keepdim=True)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _linear(module: nn.Module) -> nn.Module | None:
    """Linear replacement of maximum pools, norms and attention, whose gradients do not show where elements lie."""
    if "Attention" in type(module).__name__:
        _replace(module, _linear)
        return _Bypass(module)
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    if "StdConv" in type(module).__name__:
        return _unstandardised(module)
    leaf = not any(True for _ in module.children())
    return nn.Identity() if leaf and "Norm" in type(module).__name__ else None


def _unstandardised(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution without timm's standardisation of weights, which turns a constant kernel into 0."""
    from timm.layers import Conv2dSame

    kind = Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    arguments = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return kind(*arguments, conv.groups, bias=conv.bias is not None, device=conv.weight.device)


def _fill(probe: nn.Module) -> None:
    """Constant kernels of sum 1, scales and variances of 1, everything else 0."""
    for module in probe.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = 1 / parameter[0].numel() if parameter.ndim > 1 else float("bias" not in name)
            setattr(module, name, nn.Parameter(torch.full(parameter.shape, value)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                value = float(name == "running_var")
                module.register_buffer(name, torch.full(buffer.shape, value, dtype=buffer.dtype))


class _Bypass(nn.Module):
    """Returns a layer's input in place of its output, where both have the same shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # the network reads attributes of its layer
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor, *args, **kwargs):
        result = self.layer(x, *args, **kwargs)
        return x if isinstance(result, Tensor) and result.shape == x.shape else result


def _replace(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    for name, child in module.named_children():
        if (new := replacement(child)) is not None:
            setattr(module, name, new)
        else:
            _replace(child, replacement)
