"""Refinement over fixed neighbours: PAMR and PAR, whose weights are a picture's, and the random walk of PSA and IRN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _library

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
    if cam.dim() != 4 or image.dim() != 4 or len(cam) != len(image) or cam.shape[2:] != image.shape[2:]:
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


def check_settings(dilations: Sequence[int], steps: int, form: str) -> None:
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations must be at least one distance of 1 or more pixels; got {list(dilations)}")
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


@register_flop_formula([torch.ops.ercn.pixel_adaptive_refinement, torch.ops.ercn.pixel_adaptive_refinement_backward])
def _(map_shape, image_shape, dilations, steps, *args, out_shape=None, **kwargs) -> int:
    return 2 * steps * 8 * len(dilations) * map_shape.numel()
