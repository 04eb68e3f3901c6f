"""Gated attention pooling: attention multiple-instance learning over dense, masked or ragged bags of instances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _library
from ercn.ops.reference import accumulate_dtype


def gated_attention_pool(
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool a bag of instances by (gated) attention.

        s_k = w · (tanh(V h_k + b_V) ⊙ σ(U h_k + b_U)) + b_w,   a = softmax_k(s),   z = Σ_k a_k h_k

    Args:
        h: instances [B, N, D], any strides — ``fmap.flatten(2).transpose(1, 2)`` of an NCHW map is not copied —
            or ragged [T, D] with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        v_weight, u_weight: [L, D]; ``u_weight=None`` leaves the gate out (plain attention).
        v_bias, u_bias: [L] or None.
        w_weight, w_bias: [K, L] for K heads, and [K] or None.
        mask: [B, N] bool, True where the instance is real. A masked instance has score -inf, weight and gradient 0,
            whatever ``h`` holds there. Dense bags only.
        cu_seqlens: [B+1] int32 or int64, bag b is ``h[cu_seqlens[b]:cu_seqlens[b + 1]]``; from 0 to T, never falling.
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        pooled: z, [B, K, D] in h's dtype.
        scores: s before the softmax, [B, K, N] or [K, T]; float64 for float64 h, else float32.
        An empty or fully masked bag gives pooled 0 and zero gradients. Gradients flow through both outputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.
        NotImplementedError: double backward or forward-mode AD; ``torch.func.grad`` and ``jacrev`` raise torch's error.

    FLOPs are 4·B·N·D·L for the projections (2·B·N·D·L ungated) and 2·B·N·K·(L + D). No [N, L] activation is kept:
    the backward computes it again. Two runs on one machine are bit-equal. Under autocast all floating inputs are cast.

    Source: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018.

    >>> import torch
    >>> from ercn.ops import gated_attention_pool
    >>> fmap = torch.ones(2, 8, 3, 3)                                # every element is an instance
    >>> h = fmap.flatten(2).transpose(1, 2)                          # [B=2, N=9, D=8], a view
    >>> v, u, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(1, 4)
    >>> pooled, scores = gated_attention_pool(h, v, None, u, None, w, None)
    >>> pooled.shape, scores.shape, torch.allclose(pooled, torch.ones(2, 1, 8))
    (torch.Size([2, 1, 8]), torch.Size([2, 1, 9]), True)
    """
    _check(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens)
    _library.refuse_forward_mode("gated_attention_pool", h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    return torch.ops.ercn.gated_attention_pool(
        h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, _backends.requested(backend)
    )


def _check(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens) -> None:
    if h.dim() != (2 if cu_seqlens is not None else 3):
        raise ValueError(f"h must be [B, N, D], or ragged [T, D] with cu_seqlens; got {list(h.shape)}" + (
            "" if cu_seqlens is None else " with cu_seqlens"
        ))
    if v_weight.dim() != 2 or w_weight.dim() != 2:
        raise ValueError(
            f"v_weight must be [L, D] and w_weight [K, L]; got {list(v_weight.shape)} and {list(w_weight.shape)}"
        )
    dim, hidden, heads = h.shape[-1], v_weight.shape[0], w_weight.shape[0]
    if u_weight is None and u_bias is not None:
        raise ValueError("u_bias must be None where u_weight is None (plain attention)")
    expected = {
        "v_weight": (v_weight, (hidden, dim)),
        "v_bias": (v_bias, (hidden,)),
        "u_weight": (u_weight, (hidden, dim)),
        "u_bias": (u_bias, (hidden,)),
        "w_weight": (w_weight, (heads, hidden)),
        "w_bias": (w_bias, (heads,)),
    }
    if not h.is_floating_point():
        raise ValueError(f"h must be floating point; got {h.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for D = {dim}, L = {hidden}, K = {heads}; got {list(tensor.shape)}"
            )
        if tensor.dtype != h.dtype and not _autocast(h.device):
            raise ValueError(f"{name} must have h's dtype {h.dtype} outside autocast; got {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{name} must be on h's device {h.device}; got {tensor.device}")
    if mask is not None:
        if cu_seqlens is not None:
            raise ValueError("mask is for dense bags [B, N, D]; ragged bags leave instances out instead")
        if mask.dtype != torch.bool or mask.shape != h.shape[:2] or mask.device != h.device:
            raise ValueError(
                f"mask must be bool {list(h.shape[:2])} on {h.device}; "
                f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
    if cu_seqlens is not None:
        integer = cu_seqlens.dtype in (torch.int32, torch.int64)
        if not integer or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != h.device:
            raise ValueError(
                f"cu_seqlens must be int32 or int64 [B+1] on {h.device}; "
                f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
            )


def _autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


_INPUTS = (
    "Tensor h, Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias, "
    "Tensor? mask, Tensor? cu_seqlens"
)
_FORWARD = _library.define(f'gated_attention_pool({_INPUTS}, str backend="") -> (Tensor pooled, Tensor scores)')
_BACKWARD = _library.define(
    f"gated_attention_pool_backward(Tensor? grad_pooled, Tensor? grad_scores, {_INPUTS}, Tensor pooled, Tensor scores, "
    'bool[] needs, str backend="") -> (Tensor grad_h, Tensor grad_v_weight, Tensor grad_v_bias, '
    "Tensor grad_u_weight, Tensor grad_u_bias, Tensor grad_w_weight, Tensor grad_w_bias)"
)
_DIFFERENTIABLE = 7  # h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias


@torch.library.register_fake(_FORWARD)
def _(h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, backend=""):
    heads = w_weight.shape[0]
    if cu_seqlens is None:
        bags, scores = h.shape[0], (h.shape[0], heads, h.shape[1])
    else:
        bags, scores = cu_seqlens.shape[0] - 1, (heads, h.shape[0])
    return h.new_empty(bags, heads, h.shape[-1]), h.new_empty(scores, dtype=accumulate_dtype(h))


@torch.library.register_fake(_BACKWARD)
def _(grad_pooled, grad_scores, h, *args):
    inputs, needs = (h, *args[: _DIFFERENTIABLE - 1]), args[10]
    return tuple(h.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_pooled, grad_scores):
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    if grad_pooled is None and grad_scores is None:
        return (None,) * 10
    grads = _BACKWARD(grad_pooled, grad_scores, *ctx.saved_tensors, needs, ctx.backend)
    return (*(grad if need else None for grad, need in zip(grads, needs)), None, None, None)


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)
_library.refuse_double_backward(_BACKWARD)
_library.autocast(_FORWARD, lambda cast, args: (*map(cast, args[:_DIFFERENTIABLE]), *args[_DIFFERENTIABLE:]))


@torch.library.register_vmap(_FORWARD)
def _(info, in_dims, *args):
    h_dim, *weight_dims, mask_dim = in_dims[:8]
    if args[8] is None and all(dim is None for dim in weight_dims):  # only the bags are batched: more bags
        fold = [_library.fold(dim, info.batch_size, x) for dim, x in ((h_dim, args[0]), (mask_dim, args[7]))]
        outputs = _FORWARD(fold[0], *args[1:7], fold[1], None, *args[9:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)
    return _library.loop(_FORWARD, info.batch_size, in_dims, args)


@torch.library.register_vmap(_BACKWARD)
def _(info, in_dims, *args):
    return _library.loop(_BACKWARD, info.batch_size, in_dims, args)


@register_flop_formula(torch.ops.ercn.gated_attention_pool)
def _(h_shape, v_shape, v_bias, u_shape, u_bias, w_shape, *args, out_shape=None, **kwargs) -> int:
    return _projection_flops(h_shape, v_shape, u_shape) + _narrow_flops(h_shape, w_shape)


@register_flop_formula(torch.ops.ercn.gated_attention_pool_backward)
def _(
    grad_pooled, grad_scores, h_shape, v_shape, v_bias, u_shape, u_bias, w_shape, w_bias, mask, cu_seqlens, pooled,
    scores, needs, *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """The projections again, one product of their size for the weights and one for h; counted by what is asked for."""
    products = 1 + (needs[1] or needs[3]) + needs[0]
    return products * _projection_flops(h_shape, v_shape, u_shape) + 2 * _narrow_flops(h_shape, w_shape)


def _projection_flops(h_shape, v_shape, u_shape) -> int:
    instances = h_shape[0] * h_shape[1] if len(h_shape) == 3 else h_shape[0]
    return 2 * instances * h_shape[-1] * v_shape[0] * (1 if u_shape is None else 2)


def _narrow_flops(h_shape, w_shape) -> int:
    instances = h_shape[0] * h_shape[1] if len(h_shape) == 3 else h_shape[0]
    return 2 * instances * w_shape[0] * (w_shape[1] + h_shape[-1])
