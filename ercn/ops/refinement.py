"""Refinement over fixed neighbours: PAMR and PAR, whose weights are a picture's, and the random walk of PSA and IRN."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
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
    """Draw maps to the edges of a picture: every pixel becomes a mean of the neighbours that look like it.

        m_i <- Σ_j w_ij m_j,  ``steps`` times
        form "pamr":  w_ij = softmax_j(-mean_c |I_c(i) - I_c(j)| / (1e-8 + 0.1 σ_c(i)))
        form "par":   w_ij = softmax_j(-mean_c (|I_c(i) - I_c(j)| / (0.3 (1e-8 + σ_c(i))))²)
                           + 0.01 softmax_j(-(r_ij / (0.3 σ_r))²),  r_ij in pixels, σ_r its standard deviation over j

    The neighbours j of pixel i are the 8 at each dilation d, (±d or 0, ±d or 0) away; i itself is none of them. σ_c(i)
    is the standard deviation (n - 1 in the denominator) of channel c over them; in "pamr" i counts too, once for each
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
        Differentiable in ``cam``, twice too, by the adjoint of w.

    Raises:
        ValueError: shapes, dtypes, devices, dilations, steps or a form that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: an image that needs a gradient (published training takes none: pass ``image.detach()``), or
            forward-mode AD.

    FLOPs are 2·steps·P·B·C·H·W with P = 8·len(dilations) (the weights, made once, are not counted). No copy of the
    neighbours is stored: memory is two maps and the weights of one image, 4·P·H·W bytes in float32; on the CPU nothing
    of them from 64 MiB on, unless for a gradient. Two runs are bit-equal. Autocast changes nothing.

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
    return torch.ops.ercn.pixel_adaptive_refinement(cam, image, list(dilations), steps, form, backend)


def random_walk(
    value: Tensor,
    affinity: Tensor,
    *,
    radius: int = 5,
    beta: float = 8.0,
    steps: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Let maps walk ``steps`` times over the affinities of near pixels: the propagation of PSA and IRN.

        out = V · T^steps,   T_ij = A_ij^β / Σ_k A_kj^β,   A_ii = 1,   A_ij = 0 farther than the radius

    Each pixel becomes a mean of those near it: constants stay, and no value leaves the range of the map. The published
    code squares the dense N×N matrix T ``exp_times`` times, steps = 2 ** exp_times; here T, which has 2P + 1 entries a
    pixel, is applied ``steps`` times. With the published radius of 5 pixels P is 34: 256 steps of 21 maps of 56² pixels
    are 2.3 GFLOP, eight squarings 493.

    Args:
        value: V, [B, C, H, W], floating point.
        affinity: of pairs of pixels less than ``radius`` apart, in [0, 1]: [B, P, H, W], where [:, p, y, x] is that of
            pixel (y, x) and its neighbour p, at (0, 1), …, (0, radius - 1), then those of the rows below, row by row
            and from the left. What is said of a neighbour beyond the border is not read. ``feature_affinity`` (PSA)
            and ``edge_affinity`` (IRN) have this layout.
        radius: in pixels, at least 2.
        beta: β, above 0; PSA takes 8, IRN 10.
        steps: at least 0.
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        Like ``value`` in shape and dtype, contiguous; computed in float32, or in float64 where an input is.
        Differentiable in ``value``, twice too, by the adjoint of T.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: an affinity that needs a gradient (the published networks learn from the affinities
            themselves and walk without gradients: pass ``affinity.detach()``), or forward-mode AD.

    FLOPs are 2·steps·(2P + 1)·B·C·H·W; memory is two maps and T, twice 4·(2P + 1)·B·H·W bytes in float32. Two runs are
    bit-equal. Autocast changes nothing.

    Sources: PSA, Ahn and Kwak, "Learning pixel-level semantic affinity", CVPR 2018 (arXiv 1803.10464); IRN, Ahn, Cho
    and Kwak, "Weakly supervised learning of instance segmentation with inter-pixel relations", CVPR 2019 (arXiv
    1904.05044); and their published code. IRN's walks with ``value * (1 - edge)``.

    >>> import torch
    >>> from ercn.ops import edge_affinity, random_walk
    >>> cam = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(1, 1, 3, 6)
    >>> edge = torch.tensor([0.0, 0, 1, 0, 0, 0]).expand(1, 1, 3, 6)              # it stops the walk
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
    return torch.ops.ercn.random_walk(value, affinity, radius, float(beta), steps, backend)


def feature_affinity(feat: Tensor, radius: int = 5) -> Tensor:
    """PSA's affinity exp(-mean_d |f_i - f_j|) of features [B, D, H, W], in the layout of ``random_walk``: [B, P, H, W].

    As published, pixels less than radius - 1 from the left, right or lower border have no pairs of their own, affinity
    0; that of the others, [:, :, : 1 - radius, radius - 1 : 1 - radius], is what PSA learns from. Differentiable, in
    plain torch. Source: Ahn and Kwak, CVPR 2018, and its published code.

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
    return torch.nn.functional.pad(torch.stack(pairs, 1), (reach, reach, 0, reach))


def edge_affinity(edge: Tensor, radius: int = 5) -> Tensor:
    """IRN's affinity 1 - max e of all pixels on the line from i to j, in the layout of ``random_walk``: [B, P, H, W].

    edge [B, 1, H, W], probabilities of a class boundary. A pixel between the two is on the line where it is less than
    one pixel from it. Beyond the border e is 1. Differentiable, in plain torch. Source: Ahn, Cho and Kwak, CVPR 2019,
    and its published code.

    >>> import torch
    >>> from ercn.ops import edge_affinity
    >>> edge_affinity(torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]]), radius=2)[0, 0]   # with the pixel to the right
    tensor([[1., 0., 0., 0.]])
    """
    if edge.dim() != 4 or edge.shape[1] != 1:
        raise ValueError(f"edge must be [B, 1, H, W]; got {list(edge.shape)}")
    reach, (h, w) = radius - 1, edge.shape[2:]
    padded = torch.nn.functional.pad(edge[:, 0], (reach, reach, 0, reach), value=1.0)
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


_REFINE = _library.define(
    "pixel_adaptive_refinement(Tensor cam, Tensor image, int[] dilations, int steps, str form, "
    'str backend="") -> Tensor'
)
_REFINE_BACKWARD = _library.define(
    "pixel_adaptive_refinement_backward(Tensor grad_out, Tensor image, int[] dilations, int steps, str form, "
    'str backend="") -> Tensor'
)

_WALK = _library.define(
    'random_walk(Tensor value, Tensor affinity, int radius, float beta, int steps, str backend="") -> Tensor'
)
_WALK_BACKWARD = _library.define(
    "random_walk_backward(Tensor grad_out, Tensor affinity, int radius, float beta, int steps, "
    'str backend="") -> Tensor'
)


def _like(map_, *args):
    return torch.empty_like(map_, memory_format=torch.contiguous_format)


def _keep_guide(guide: str):
    """setup_context of a linear op of its first argument: it keeps the second and all settings."""

    def setup_context(ctx, inputs, output):
        _, tensor, *ctx.settings = inputs
        if ctx.needs_input_grad[1]:
            raise NotImplementedError(
                f"the refinement has no gradient of {guide}, as in the published training: pass {guide}.detach()"
            )
        ctx.save_for_backward(tensor)

    return setup_context


def _adjoint(op):
    def backward(ctx, grad):
        (guide,) = ctx.saved_tensors
        return op(grad, guide, *ctx.settings), None, *(None for _ in ctx.settings)

    return backward


def _vmap(op):
    """Maps of one picture become channels of it; else everything is folded into the batch."""

    def vmap(info, in_dims, map_, guide, *settings):
        size = info.batch_size
        if in_dims[1] is None:
            stacked = map_.movedim(in_dims[0], 1)  # [B, size, C, H, W]
            return op(stacked.flatten(1, 2), guide, *settings).unflatten(1, (size, -1)), 1
        folded = (_library.fold(dim, size, x) for dim, x in zip(in_dims, (map_, guide)))
        return op(*folded, *settings).unflatten(0, (size, -1)), 0

    return vmap


def _register(forward, backward, guide: str) -> None:
    """A pair of ops that are linear in the map, each the other's adjoint."""
    for op, adjoint in ((forward, backward), (backward, forward)):
        torch.library.register_fake(op)(_like)
        torch.library.register_autograd(op, _adjoint(adjoint), setup_context=_keep_guide(guide))
        torch.library.register_vmap(op)(_vmap(op))


_register(_REFINE, _REFINE_BACKWARD, "image")
_register(_WALK, _WALK_BACKWARD, "affinity")


@register_flop_formula([torch.ops.ercn.pixel_adaptive_refinement, torch.ops.ercn.pixel_adaptive_refinement_backward])
def _(map_shape, image_shape, dilations, steps, *args, out_shape=None, **kwargs) -> int:
    return 2 * steps * 8 * len(dilations) * map_shape.numel()


@register_flop_formula([torch.ops.ercn.random_walk, torch.ops.ercn.random_walk_backward])
def _(map_shape, affinity_shape, radius, beta, steps, *args, out_shape=None, **kwargs) -> int:
    return 2 * steps * (2 * affinity_shape[1] + 1) * map_shape.numel()
