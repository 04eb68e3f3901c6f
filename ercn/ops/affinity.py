"""ReLU affinity: one symmetric linear operator on pixel maps, and SEAM's propagation around it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _library
from ercn.ops.reference import accumulate_dtype


def relu_affinity(value: Tensor, feat: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply pixel maps by the ReLU affinity of pixel embeddings, without storing the N×N matrix.

        out = V · A,   A = relu(T),   T = Fᵀ F

    A is symmetric, so the op is its own adjoint: grad_value = relu_affinity(grad_out, feat), and
    grad_feat = F · (1[T>0] ⊙ (VᵀG + GᵀV)), with the subgradient 0 at T = 0. Only the gradients asked for are computed.

    Args:
        value: V, [B, C, N] or [B, C, H, W], floating point.
        feat: F, [B, D, N] or [B, D, H, W], float32, bfloat16, float16 or float64, any strides (channels-last too).
            It sets the precision of T; nothing is normalised here.
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        out shaped as ``value``, contiguous; float64 if an input is, else float32 (sums are never rounded to half).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: double backward or forward-mode AD; ``torch.func.grad`` and ``jacrev`` raise torch's error.

    FLOPs are 2·B·N²·(D + C) counted densely; memory is O(B·N·(C + D)). Two runs on one machine are bit-equal.
    Under autocast ``feat`` is cast to autocast's dtype and ``value`` is not.

    >>> import torch
    >>> from ercn.ops import relu_affinity
    >>> feat = torch.tensor([[[1.0, 0.0, -1.0]]])      # three pixels, D = 1
    >>> relu_affinity(torch.tensor([[[2.0, 3.0, 4.0]]]), feat)
    tensor([[[2., 0., 4.]]])
    """
    _check_pair("value", value, feat)
    _library.refuse_forward_mode("relu_affinity", value, feat)
    out = torch.ops.ercn.relu_affinity(_flat(value), _flat(feat), _backends.requested(backend))
    return out.view(value.shape)


def affinity_propagate(
    cam: Tensor,
    feat: Tensor,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
    steps: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Refine class activation maps by pixel affinity: the pixel correlation module of SEAM.

        f_i = feat_i / (‖feat_i‖₂ + eps),   S_ij = relu(f_i · f_j),   out_j = Σ_i cam_i S_ij / (Σ_i S_ij + eps)

    Each output pixel is a convex combination of input pixels up to eps: a constant map stays that constant and
    outputs stay within the map's range.

    Args:
        cam: [B, C, H, W] or [B, C, N], floating point.
        feat: [B, D, H, W] or [B, D, N] pixel embeddings of the same pixels, any strides.
        eps: added to the norms and to the row sums, both in float32 or better.
        normalize: L2-normalise ``feat`` over channels first; False takes it as it is.
        steps: how often the normalised propagation is applied, ≥ 1.
        backend: as in ``relu_affinity``.

    Returns:
        out like ``cam`` in shape and dtype. Differentiable in ``cam`` and ``feat``; memory is O(B·N·(C + D)).

    Raises:
        ValueError, RuntimeError, NotImplementedError: as ``relu_affinity``; ``steps`` below 1.

    Source: Wang et al., "Self-supervised equivariant attention mechanism for weakly supervised semantic
    segmentation", CVPR 2020.

    >>> import torch
    >>> from ercn.ops import affinity_propagate
    >>> cam = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    >>> feat = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]])  # two rows, two kinds of pixel
    >>> affinity_propagate(cam, feat).round(decimals=3)
    tensor([[[[0.5000, 0.5000],
              [0.0000, 0.0000]]]])
    """
    _check_pair("cam", cam, feat)
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    _library.refuse_forward_mode("relu_affinity", cam, feat)
    acc = accumulate_dtype(cam, feat)
    f = _flat(feat)
    if normalize:
        wide = f.to(acc)
        f = (wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + eps)).to(feat.dtype)
    backend = _backends.requested(backend)
    out = _flat(cam).to(acc)
    ones = out.new_ones(out.shape[0], 1, out.shape[2])
    for _ in range(steps):
        # The row of ones meets the same rounded affinities, so numerator and denominator round alike.
        product = torch.ops.ercn.relu_affinity(torch.cat([out, ones], dim=1), f, backend)
        out = product[:, :-1] / (product[:, -1:] + eps)
    return out.reshape(cam.shape).to(cam.dtype)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2) if x.dim() == 4 else x


def _check_pair(name: str, value: Tensor, feat: Tensor) -> None:
    wanted = f"{name} must be [B, C, N] with feat [B, D, N], or [B, C, H, W] with feat [B, D, H, W]"
    got = f"got {name} {list(value.shape)}, feat {list(feat.shape)}"
    if value.dim() != feat.dim() or value.dim() not in (3, 4):
        raise ValueError(f"{wanted}; {got}")
    if value.shape[0] != feat.shape[0] or value.shape[2:] != feat.shape[2:]:
        raise ValueError(f"{wanted}; {got}")
    if not (value.is_floating_point() and feat.is_floating_point()):
        raise ValueError(f"{name} and feat must be floating point; got {value.dtype} and {feat.dtype}")
    if value.device != feat.device:
        raise ValueError(f"{name} and feat must be on one device; got {value.device} and {feat.device}")


_FORWARD = _library.define('relu_affinity(Tensor value, Tensor feat, str backend="") -> Tensor')
_BACKWARD = _library.define(
    "relu_affinity_backward(Tensor grad_out, Tensor value, Tensor feat, bool need_value, "
    'str backend="") -> (Tensor grad_value, Tensor grad_feat)'
)


@torch.library.register_fake(_FORWARD)
def _(value, feat, backend=""):
    return value.new_empty(value.shape, dtype=accumulate_dtype(value, feat))


@torch.library.register_fake(_BACKWARD)
def _(grad_out, value, feat, need_value, backend=""):
    return value.new_empty(value.shape if need_value else 0), feat.new_empty(feat.shape)


def _setup_context(ctx, inputs, output):
    value, feat, ctx.backend = inputs
    ctx.value_dtype = value.dtype
    ctx.save_for_backward(value if ctx.needs_input_grad[1] else None, feat)


def _backward(ctx, grad_out):
    value, feat = ctx.saved_tensors
    need_value, need_feat, *_ = ctx.needs_input_grad
    if not need_feat:  # the op is its own adjoint
        return _FORWARD(grad_out, feat, ctx.backend).to(ctx.value_dtype), None, None
    grad_value, grad_feat = _BACKWARD(grad_out, value, feat, need_value, ctx.backend)
    return grad_value if need_value else None, grad_feat, None


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
_library.refuse_double_backward(_BACKWARD)
_library.autocast(_FORWARD, lambda cast, args: (args[0], cast(args[1]), *args[2:]))


@torch.library.register_vmap(_FORWARD)
def _(info, in_dims, value, feat, backend=""):
    size = info.batch_size
    out = _FORWARD(_library.fold(in_dims[0], size, value), _library.fold(in_dims[1], size, feat), backend)
    return out.unflatten(0, (size, -1)), 0


@torch.library.register_vmap(_BACKWARD)
def _(info, in_dims, grad_out, value, feat, need_value, backend=""):
    size = info.batch_size
    folded = (_library.fold(dim, size, x) for dim, x in zip(in_dims, (grad_out, value, feat)))
    grad_value, grad_feat = _BACKWARD(*folded, need_value, backend)
    grad_value = grad_value.unflatten(0, (size, -1)) if need_value else grad_value
    return (grad_value, grad_feat.unflatten(0, (size, -1))), (0 if need_value else None, 0)


@register_flop_formula(torch.ops.ercn.relu_affinity)
def _(value_shape, feat_shape, *args, out_shape=None, **kwargs) -> int:
    (b, c, n), d = value_shape, feat_shape[1]
    return 2 * b * n * n * (d + c)


@register_flop_formula(torch.ops.ercn.relu_affinity_backward)
def _(grad_shape, value_shape, feat_shape, need_value, *args, out_shape=None, **kwargs) -> int:
    """T again, W at depth 2C, F·W, and G·A where asked for."""
    (b, c, n), d = grad_shape, feat_shape[1]
    return 2 * b * n * n * (2 * d + (3 if need_value else 2) * c)
