"""ReLU affinity: one symmetric linear operator on pixel maps, and SEAM's propagation around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _library, reference
from ercn.ops.reference import accumulate_dtype


def relu_affinity(value: Tensor, feat: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply pixel maps by the ReLU affinity of pixel embeddings, without storing the N×N matrix.

        out = V · A,   A = relu(T),   T = Fᵀ F

    A is symmetric, so the op is its own adjoint: grad_value = relu_affinity(grad_out, feat), and
    grad_feat = F · (1[T>0] ⊙ (VᵀG + GᵀV)), with the subgradient 0 at T = 0. Gradients are computed only if needed.

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
        NotImplementedError: a third derivative. The first two exist in reverse and forward mode, as do ``vmap`` and
            the transforms of ``torch.func``, which except for ``vmap`` break the graph of torch.compile. The kink at
            T = 0 has no second derivative. Beyond the first gradient and the tangent of value, they are in part plain
            torch, blockwise, on every backend.

    FLOPs are 2·B·N²·(D + C) counted densely; memory is O(B·N·(C + D)). Two runs on one machine are bit-equal.
    Under autocast ``feat`` is cast to autocast's dtype and ``value`` is not.

    >>> import torch
    >>> from ercn.ops import relu_affinity
    >>> feat = torch.tensor([[[1.0, 0.0, -1.0]]])      # three pixels, D = 1
    >>> relu_affinity(torch.tensor([[[2.0, 3.0, 4.0]]]), feat)
    tensor([[[2., 0., 4.]]])
    """
    _check_pair("value", value, feat)
    if value.dim() == 3:
        return _relu_affinity(value, feat, _backends.requested(backend))
    return _relu_affinity(value.flatten(2), feat.flatten(2), _backends.requested(backend)).view(value.shape)


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
        normalize: whether to L2-normalise ``feat`` over channels first.
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
    settings = eps, normalize, steps, _backends.requested(backend)
    propagate = _SingleLevelPropagation.apply if _library.is_plain_eager(cam, feat) else _propagated
    out: Tensor = propagate(cam, feat, *settings)
    return out


def _propagated(cam: Tensor, feat: Tensor, eps: float, normalize: bool, steps: int, backend: str) -> Tensor:
    """Composed of differentiable parts."""
    acc = accumulate_dtype(cam, feat)
    f = _flat(feat)
    if normalize:
        wide = f.to(acc)
        f = (wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + eps)).to(feat.dtype)
    out = _flat(cam).to(acc)
    ones = out.new_ones(out.shape[0], 1, out.shape[2])
    for _ in range(steps):
        # The row of ones is multiplied by the same rounded affinities: numerator and denominator round alike.
        product = _relu_affinity(torch.cat([out, ones], dim=1), f, backend)
        out = product[:, :-1] / (product[:, -1:] + eps)
    return out.reshape(cam.shape).to(cam.dtype)


class _SingleLevelPropagation(torch.autograd.Function):
    """``_propagated`` with its backward written out, which saves most of the time of a small call."""

    @staticmethod
    def forward(
        ctx: Any, cam: Tensor, feat: Tensor, eps: float, normalize: bool, steps: int, backend: str
    ) -> Tensor:
        ctx.settings = eps, normalize, steps, backend
        acc = accumulate_dtype(cam, feat)
        f = _flat(feat)
        norm = divisor = None
        if normalize:
            wide = _to(f, acc)
            norm = torch.linalg.vector_norm(wide, 2, 1, True)
            divisor = norm + eps
            f = _to(wide / divisor, feat.dtype)
        out = _to(_flat(cam), acc)
        ones = out.new_ones(out.shape[0], 1, out.shape[2])
        parts = out.shape[1], 1
        kept: list[Tensor] = []
        for step in range(steps):
            value = torch.cat((out, ones), 1)
            product, denominator = torch.split_with_sizes(_library.run(_FORWARD, value, f, backend), parts, 1)
            denominator.add_(eps)
            kept += (value, product, denominator)
            if step < steps - 1:
                out = product / denominator
        ctx.save_for_backward(cam, feat, norm, divisor, f, *kept)
        # A new tensor, neither saved nor a view: the caller may change it in place.
        return _to(_spatial(product, cam) / _spatial(denominator, cam), cam.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cam, feat, norm, divisor, f, *kept = ctx.saved_tensors
        *_, backend = ctx.settings
        no_settings = (None,) * len(ctx.settings)
        need_cam, need_feat, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is needed
            cam, feat = cam.view_as(cam), feat.view_as(feat)  # two nodes, even if one is computed from the other
            inputs = [x for x, need in ((cam, need_cam), (feat, need_feat)) if need]
            out = _propagated(cam, feat, *ctx.settings)
            grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
            return next(grads) if need_cam else None, next(grads) if need_feat else None, *no_settings
        acc = kept[0].dtype
        grad = _to(_flat(grad_out), acc)
        channels = grad.shape[1]
        total: Tensor | None = None
        for step in range(len(kept) - 3, -1, -3):
            value, product, denominator = kept[step : step + 3]
            grad = grad / denominator
            grad = torch.cat((grad, (grad * product).sum(1, True).div_(denominator).neg_()), 1)
            need_value = need_cam or step > 0
            if need_feat:
                grad, part = _library.run(_BACKWARD, grad, value, f, need_value, backend)
                total = _to(part, acc) if total is None else total + part
            else:
                grad = _library.run(_FORWARD, grad, f, backend)
            if need_value:
                grad = grad.narrow(1, 0, channels)
        grad_cam = _to(_shaped(grad, cam), cam.dtype) if need_cam else None
        if total is None:
            return grad_cam, None, *no_settings
        if norm is not None:  # the gradient of x / (|x| + eps), whose second term is 0 where x is 0
            wide = _to(_flat(feat), acc)
            along = (wide * total).sum(1, True) / (norm * divisor).clamp_min_(_TINY)
            total = torch.addcmul(total, wide, along, value=-1) / divisor
        return grad_cam, _to(_shaped(total, feat), feat.dtype), *no_settings


_TINY = torch.finfo(torch.float32).tiny


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2) if x.dim() == 4 else x


def _spatial(x: Tensor, like: Tensor) -> Tensor:
    """A view [B, ·, H, W] of x [B, ·, N] where ``like`` is spatial."""
    return x.unflatten(2, like.shape[2:]) if like.dim() == 4 else x


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape) if like.dim() == 4 else x


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _check_pair(name: str, value: Tensor, feat: Tensor) -> None:
    v, f = value.shape, feat.shape
    if len(v) != len(f) or len(v) not in (3, 4) or v[0] != f[0] or v[2:] != f[2:]:
        raise ValueError(
            f"{name} must be [B, C, N] with feat [B, D, N], or [B, C, H, W] with feat [B, D, H, W]; "
            f"got {name} {list(v)}, feat {list(f)}"
        )
    if not (value.is_floating_point() and feat.is_floating_point()):
        raise ValueError(f"{name} and feat must be floating point; got {value.dtype} and {feat.dtype}")
    if value.device != feat.device:
        raise ValueError(f"{name} and feat must be on one device; got {value.device} and {feat.device}")


def _fake(value: Tensor, feat: Tensor, backend: str = "") -> Tensor:
    return value.new_empty(value.shape, dtype=accumulate_dtype(value, feat))


def _fake_backward(
    grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool, backend: str = ""
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape if need_value else 0), feat.new_empty(feat.shape)


_FORWARD = _library.define('relu_affinity(Tensor value, Tensor feat, str backend="") -> Tensor', _fake)
_BACKWARD = _library.define(
    "relu_affinity_backward(Tensor grad_out, Tensor value, Tensor feat, bool need_value, "
    'str backend="") -> (Tensor grad_value, Tensor grad_feat)',
    _fake_backward,
)


class _Affinity(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        value, feat, ctx.backend = inputs
        ctx.value_dtype = value.dtype
        ctx.save_for_backward(value if ctx.needs_input_grad[1] else None, feat)
        _library.save_for_forward(ctx, value, feat)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, feat = ctx.saved_tensors
        need_value, need_feat, *_ = ctx.needs_input_grad
        if not need_feat:  # the op is its own adjoint in value
            return _relu_affinity(grad_out, feat, ctx.backend).to(ctx.value_dtype), None, None
        grad_value, grad_feat = _relu_affinity_backward(grad_out, value, feat, need_value, ctx.backend)
        return grad_value if need_value else None, grad_feat, None

    @staticmethod
    def jvp(ctx: Any, value_tangent: Tensor, feat_tangent: Tensor, _: None) -> Tensor:
        value, feat = ctx.saved_tensors
        along_value = _relu_affinity(value_tangent, feat, ctx.backend)
        return along_value + _derivative(value, feat_tangent, feat, feat).to(along_value.dtype)


class _AffinityBackward(torch.autograd.Function):
    """(G·A, F·W), W = 1[T>0] ⊙ (VᵀG + GᵀV). For their cotangents (Y, X), and S = FᵀX + XᵀF:

        dG = Y·A + V·(1 ⊙ S),   dV = G·(1 ⊙ S),   dF = F·(1 ⊙ (GᵀY + YᵀG)) + X·W
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_out, value, feat, ctx.need_value, ctx.backend = inputs
        ctx.save_for_backward(grad_out, value, feat)
        _library.save_for_forward(ctx, grad_out, value, feat)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, y: Tensor | None, x: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, value, feat = ctx.saved_tensors
        need_grad, need_value, need_feat, *_ = ctx.needs_input_grad
        along_grad = along_value = along_feat = None
        if y is not None and ctx.need_value:
            along_grad, along_feat = _relu_affinity_backward(y, grad_out, feat, True, ctx.backend)
            along_grad = along_grad.to(grad_out.dtype)
        if x is not None:
            if need_grad:
                along_grad = _sum(along_grad, _derivative(value, feat, x, feat).to(grad_out.dtype))
            if need_value:
                along_value = _derivative(grad_out, feat, x, feat).to(value.dtype)
            if need_feat:
                along_feat = _sum(along_feat, _derivative(x, value, grad_out, feat).to(feat.dtype))
        return along_grad if need_grad else None, along_value, along_feat if need_feat else None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, value_tangent: Tensor | None, feat_tangent: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        grad_out, value, feat = ctx.saved_tensors
        g, v, f = (
            torch.zeros_like(x) if tangent is None else tangent
            for tangent, x in ((grad_tangent, grad_out), (value_tangent, value), (feat_tangent, feat))
        )
        of_feat = _derivative(f, value, grad_out, feat) + _derivative(feat, v, grad_out, feat)
        of_feat = (of_feat + _derivative(feat, value, g, feat)).to(feat.dtype)
        if not ctx.need_value:
            return value.new_zeros(0), of_feat
        of_value = _relu_affinity(g, feat, ctx.backend) + _derivative(grad_out, f, feat, feat)
        return of_value.to(value.dtype), of_feat


class _Derivative(torch.autograd.Function):
    """``reference.relu_affinity_derivative``, without a derivative in turn."""

    forward = staticmethod(reference.relu_affinity_derivative)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "relu_affinity has no third derivative: differentiate value @ relu(feat.mT @ feat) in plain torch instead"
        )

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        folded = (_library.fold(dim, info.batch_size, x) for dim, x in zip(in_dims, args))
        return _library.unfold(_derivative(*folded), info.batch_size)


_derivative: Callable[..., Tensor] = _Derivative.apply


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _map(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """vmap as a larger batch."""
    folded = (_library.fold(dim, info.batch_size, x) for dim, x in zip(in_dims, args))
    return _library.unfold(op(*folded), info.batch_size)


_relu_affinity: Callable[..., Tensor] = _library.join(_FORWARD, _Affinity, _map, casts=("feat",))
_relu_affinity_backward: Callable[..., tuple[Tensor, Tensor]] = _library.join(_BACKWARD, _AffinityBackward, _map)


@register_flop_formula(torch.ops.ercn.relu_affinity)
def _(value: torch.Size, feat: torch.Size, *args: Any, **kwargs: Any) -> int:
    (b, c, n), d = value, feat[1]
    return 2 * b * n * n * (d + c)


@register_flop_formula(torch.ops.ercn.relu_affinity_backward)
def _(grad: torch.Size, value: torch.Size, feat: torch.Size, need_value: bool, *args: Any, **kwargs: Any) -> int:
    """T again, W at depth 2C, F·W, and G·A if needed."""
    (b, c, n), d = grad, feat[1]
    return 2 * b * n * n * (2 * d + (3 if need_value else 2) * c)
