"""Refinement over fixed neighbours: PAMR and PAR, whose weights are a picture's, and the random walk of PSA and IRN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _library
from ercn.ops.reference import half_disc

FORMS = ("pamr", "par")


def pixel_adaptive_refinement(
    cam: Tensor,
    image: Tensor,
    *,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    steps: int = 10,
    form: str = "pamr",
    backend: str | None = None,
) -> Tensor:
    """Align maps with the edges of a picture: each pixel becomes a mean of its neighbours of similar colour.

        m_i <- Σ_j w_ij m_j,  ``steps`` times
        form "pamr":  w_ij = softmax_j(-mean_c |I_c(i) - I_c(j)| / (1e-8 + 0.1 σ_c(i)))
        form "par":   w_ij = softmax_j(-mean_c (|I_c(i) - I_c(j)| / (0.3 (1e-8 + σ_c(i))))²)
                           + 0.01 softmax_j(-(r_ij / (0.3 σ_r))²),  r_ij in pixels, σ_r its standard deviation over j

    The neighbours j of pixel i are the 8 at each dilation d, (±d or 0, ±d or 0) away, without i itself. σ_c(i) is the
    standard deviation (n - 1 in the denominator) of channel c over them; in "pamr" i counts too, once for each
    dilation. Beyond the border, picture and map repeat their edge. Rows of w sum to 1 ("pamr": constants stay, and no
    value leaves the range of the map) or 1.01 ("par"). Scale and offset of the picture do not matter.

    Args:
        cam: [B, C, H, W], floating point, of any range.
        image: [B, K, H, W], a picture or features at the size of the map, of any dtype and any K.
        dilations: distances of the neighbours in pixels, each at least 1.
        steps: how often w is applied; 0 returns the map.
        form: "pamr" or "par".
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        Like ``cam`` in shape and dtype, contiguous; computed in float32, or in float64 where an input is.
        Differentiable twice in ``cam``, by the adjoint of w.

    Raises:
        ValueError: shapes, dtypes, devices, dilations, steps or a form that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: an image that needs a gradient (published training has none: pass ``image.detach()``), or
            forward-mode AD.

    FLOPs are 2·steps·P·B·C·H·W with P = 8·len(dilations), without the weights, which are computed once. Neighbours are
    not copied: memory is two maps and the weights of one image, 4·P·H·W bytes in float32. On the CPU, weights of 64 MiB
    or more are not stored, except for a gradient. Two runs are bit-equal. Autocast changes nothing.

    Sources: PAMR, Araslanov and Roth, CVPR 2020 (arXiv 2005.08104); PAR, Ru et al., "Learning affinity from attention",
    CVPR 2022 (arXiv 2203.02664); and their published code, which also resizes the map to the picture.

    >>> import torch
    >>> from ercn.ops import pixel_adaptive_refinement
    >>> image = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 3, 6, 6)           # an edge in the middle
    >>> cam = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1]).expand(1, 1, 6, 6)     # and a map without one
    >>> pixel_adaptive_refinement(cam, image, dilations=(1, 2))[0, 0, 0].round(decimals=2)
    tensor([0.1500, 0.1500, 0.1500, 0.8500, 0.8500, 0.8500])
    """
    if cam.dim() != 4 or image.dim() != 4 or cam.shape[0] != image.shape[0] or cam.shape[2:] != image.shape[2:]:
        raise ValueError(
            "cam must be [B, C, H, W] and image [B, K, H, W] of the same B, H and W; "
            f"got {list(cam.shape)} and {list(image.shape)}"
        )
    if not cam.numel() or not image.numel():
        raise ValueError(f"cam and image must not be empty; got {list(cam.shape)} and {list(image.shape)}")
    if not cam.is_floating_point() or image.is_complex():
        raise ValueError(f"cam must be floating point, image real; got {cam.dtype} and {image.dtype}")
    if cam.device != image.device:
        raise ValueError(f"cam and image must be on one device; got {cam.device} and {image.device}")
    check_settings(dilations, steps, form)
    _library.refuse_forward_mode("pixel_adaptive_refinement", cam, image)
    backend = _backends.requested(backend)
    refined: Tensor = torch.ops.ercn.pixel_adaptive_refinement(cam, image, list(dilations), steps, form, backend)
    return refined


def random_walk(
    value: Tensor,
    affinity: Tensor,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Propagate maps by a random walk over the affinities of near pixels, as PSA and IRN do.

        out = V · T^steps,   T_ij = A_ij^β / Σ_k A_kj^β,   A_ii = 1,   A_ij = 0 farther than the radius

    Each pixel becomes a mean of the pixels near it: constants stay, and no value leaves the range of the map. The
    published code squares the dense N×N matrix T ``exp_times`` times, steps = 2 ** exp_times; here T, with its 2P + 1
    entries for each pixel, is applied ``steps`` times. For the published radius of 5 pixels P is 34: 256 steps of 21
    maps of 56² pixels are 2.3 GFLOP, eight squarings 493.

    Args:
        value: V, [B, C, H, W], floating point.
        affinity: of pairs of pixels less than ``radius`` apart, in [0, 1]: [B, P, H, W], where [:, p, y, x] is that of
            pixel (y, x) and its neighbour p, at (0, 1), …, (0, radius - 1), then those of the rows below, row by row
            and from the left. Entries of neighbours beyond the border are not read. ``feature_affinity`` (PSA) and
            ``edge_affinity`` (IRN) return this layout.
        radius: in pixels, at least 2.
        beta: β, above 0; PSA takes 8, IRN 10.
        steps: at least 0.
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        Like ``value`` in shape and dtype, contiguous; computed in float32, or in float64 where an input is.
        Differentiable twice in ``value``, by the adjoint of T.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: an affinity that needs a gradient (the published networks are trained on the affinities
            themselves, not through the walk: pass ``affinity.detach()``), or forward-mode AD.

    FLOPs are 2·steps·(2P + 1)·B·C·H·W; memory is two maps and T, twice 4·(2P + 1)·B·H·W bytes in float32. Two runs are
    bit-equal. Autocast changes nothing.

    Sources: PSA, Ahn and Kwak, "Learning pixel-level semantic affinity", CVPR 2018 (arXiv 1803.10464); IRN, Ahn, Cho
    and Kwak, "Weakly supervised learning of instance segmentation with inter-pixel relations", CVPR 2019 (arXiv
    1904.05044); and their published code. IRN's walks with ``value * (1 - edge)``.

    >>> import torch
    >>> from ercn.ops import edge_affinity, random_walk
    >>> cam = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(1, 1, 3, 6)
    >>> edge = torch.tensor([0.0, 0, 1, 0, 0, 0]).expand(1, 1, 3, 6)              # no walk across it
    >>> random_walk(cam, edge_affinity(edge, radius=2), radius=2, beta=10)[0, 0, 1].round(decimals=2) + 0.0
    tensor([0.5000, 0.5000, 0.0000, 0.0000, 0.0000, 0.0000])
    """
    pairs = len(_pairs(radius))
    if value.dim() != 4 or affinity.shape != (value.shape[0], pairs, *value.shape[2:]) or not value.numel():
        raise ValueError(
            f"value must be [B, C, H, W], not empty, and affinity [B, {pairs}, H, W] for radius {radius}; "
            f"got {list(value.shape)} and {list(affinity.shape)}"
        )
    if not (value.is_floating_point() and affinity.is_floating_point()):
        raise ValueError(f"value and affinity must be floating point; got {value.dtype} and {affinity.dtype}")
    if value.device != affinity.device:
        raise ValueError(f"value and affinity must be on one device; got {value.device} and {affinity.device}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0; got {steps}")
    _library.refuse_forward_mode("random_walk", value, affinity)
    backend = _backends.requested(backend)
    walked: Tensor = torch.ops.ercn.random_walk(value, affinity, radius, float(beta), steps, backend)
    return walked


def feature_affinity(feat: Tensor, radius: int = 5) -> Tensor:
    """PSA's affinity exp(-mean_d |f_i - f_j|) of features [B, D, H, W], in the layout of ``random_walk``: [B, P, H, W].

    As published, the affinities of pixels less than radius - 1 from the left, right or lower border are 0; PSA is
    trained on the others, [:, :, : 1 - radius, radius - 1 : 1 - radius]. Differentiable, in plain torch, deterministic.
    Source: Ahn and Kwak, CVPR 2018, and its published code.

    Raises:
        ValueError: another shape, or a map smaller than the radius needs.

    >>> import torch
    >>> from ercn.ops import feature_affinity
    >>> feature_affinity(torch.zeros(1, 2, 3, 4), radius=2)[0, 0]                 # with the pixel to the right
    tensor([[0., 1., 1., 0.],
            [0., 1., 1., 0.],
            [0., 0., 0., 0.]])
    """
    offsets, reach = _pairs(radius), radius - 1
    if feat.dim() != 4 or feat.shape[2] <= reach or feat.shape[3] <= 2 * reach:
        raise ValueError(
            f"feat must be [B, D, H, W] with H above {reach} and W above {2 * reach} for radius {radius}; "
            f"got {list(feat.shape)}"
        )
    h, w = feat.shape[2:]
    inner = feat[:, :, : h - reach, reach : w - reach]
    pairs = [
        torch.exp(-(feat[:, :, dy : h - reach + dy, reach + dx : w - reach + dx] - inner).abs().mean(1))
        for dy, dx in offsets
    ]
    return pad(torch.stack(pairs, 1), (reach, reach, 0, reach))


def edge_affinity(edge: Tensor, radius: int = 5) -> Tensor:
    """IRN's affinity 1 - max e over the pixels on the line from i to j, in the layout of ``random_walk``: [B, P, H, W].

    edge: e, [B, 1, H, W], probabilities of a class boundary. A pixel is on the line if its distance is below 1. Beyond
    the border e is 1. Differentiable, in plain torch, deterministic. Source: Ahn, Cho and Kwak, CVPR 2019, and its
    published code.

    Raises:
        ValueError: another shape, or a radius below 2.

    >>> import torch
    >>> from ercn.ops import edge_affinity
    >>> edge_affinity(torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]]), radius=2)[0, 0]   # with the pixel to the right
    tensor([[1., 0., 0., 0.]])
    """
    if edge.dim() != 4 or edge.shape[1] != 1:
        raise ValueError(f"edge must be [B, 1, H, W]; got {list(edge.shape)}")
    reach, (h, w) = radius - 1, edge.shape[2:]
    padded = pad(edge[:, 0], (reach, reach, 0, reach), value=1.0)
    pairs = []
    for dy, dx in _pairs(radius):
        line = [
            (y, x)
            for y in range(dy + 1)
            for x in range(min(0, dx), max(0, dx) + 1)
            if (dy * x - dx * y) ** 2 < dy * dy + dx * dx
        ]
        views = (padded[:, y : y + h, reach + x : reach + x + w] for y, x in line)
        pairs.append(1 - functools.reduce(torch.maximum, views))
    return torch.stack(pairs, 1)


def _pairs(radius: int) -> list[tuple[int, int]]:
    if radius < 2:
        raise ValueError(f"radius must be at least 2 pixels; got {radius}")
    return half_disc(radius)


def check_settings(dilations: Sequence[int], steps: int, form: str) -> None:
    if not isinstance(dilations, Sequence) or len(dilations) == 0 or min(dilations) < 1:
        raise ValueError(f"dilations must be a list of at least one distance of 1 or more pixels; got {dilations}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0; got {steps}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")


def _keep_guide(guide: str) -> Callable[..., None]:
    """setup_context of an op that is linear in its first argument: it saves the second and all settings."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tensor, *ctx.settings = inputs
        if ctx.needs_input_grad[1]:
            raise NotImplementedError(
                f"the refinement has no gradient of {guide}, as in the published training: pass {guide}.detach()"
            )
        ctx.save_for_backward(tensor)

    return setup_context


def _adjoint(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (guide,) = ctx.saved_tensors
        return op(grad, guide, *ctx.settings), None, *(None for _ in ctx.settings)

    return backward


def _vmap(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Maps of one guide become its channels; with a batched guide everything becomes a larger batch."""

    def vmap(info: Any, in_dims: tuple[Any, ...], map_: Tensor, guide: Tensor, *settings: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if in_dims[1] is None:
            stacked = map_.movedim(in_dims[0], 1)  # [B, size, C, H, W]
            return op(stacked.flatten(1, 2), guide, *settings).unflatten(1, (size, -1)), 1
        folded = (_library.fold(dim, size, x) for dim, x in zip(in_dims, (map_, guide)))
        return _library.unfold(op(*folded, *settings), size)

    return vmap


def _register(op: str, map_: str, guide: str, settings: str) -> None:
    """Define the op, linear in the map, and its adjoint ``{op}_backward``; each is the backward of the other."""
    forward, backward = (
        _library.define(f'{name}(Tensor {first}, Tensor {guide}, {settings}, str backend="") -> Tensor', _fake)
        for name, first in ((op, map_), (f"{op}_backward", "grad_out"))
    )
    for one, other in ((forward, backward), (backward, forward)):
        torch.library.register_autograd(one, _adjoint(other), setup_context=_keep_guide(guide))
        torch.library.register_vmap(one, _vmap(one))


def _fake(map_: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(map_, memory_format=torch.contiguous_format)


_register("pixel_adaptive_refinement", "cam", "image", "int[] dilations, int steps, str form")
_register("random_walk", "value", "affinity", "int radius, float beta, int steps")


@register_flop_formula([torch.ops.ercn.pixel_adaptive_refinement, torch.ops.ercn.pixel_adaptive_refinement_backward])
def _(map_: torch.Size, image: torch.Size, dilations: list[int], steps: int, *args: Any, **kwargs: Any) -> int:
    return 2 * steps * 8 * len(dilations) * map_.numel()


@register_flop_formula([torch.ops.ercn.random_walk, torch.ops.ercn.random_walk_backward])
def _(
    map_: torch.Size, affinity: torch.Size, radius: int, beta: float, steps: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * steps * (2 * affinity[1] + 1) * map_.numel()
