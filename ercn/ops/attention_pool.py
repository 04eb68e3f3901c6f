"""Gated attention pooling: attention multiple-instance learning over dense, masked or ragged bags of instances."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ercn.ops import _backends, _derivative, _library, reference
from ercn.ops._arguments import DIFFERENTIABLE, SCHEMA, SETTINGS, TENSORS, PoolArguments, position
from ercn.ops.reference import ACTIVATIONS, accumulate_dtype, bag_slices

_MASKED = float("-inf")
_WEIGHTS = DIFFERENTIABLE[1:]
_H, _MASK, _SEED, _DROPOUT_P = map(PoolArguments._fields.index, ("h", "mask", "seed", "dropout_p"))


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
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    masked_score: float = _MASKED,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool a bag of instances by (gated) attention.

        s_k = w · (drop(tanh(V h_k + b_V)) ⊙ drop(σ(U h_k + b_U))) + b_w,   a = softmax_k(s),   z = Σ_k a_k h_k

    Args:
        h: instances [B, N, D], any strides — ``fmap.flatten(2).transpose(1, 2)`` of an NCHW map is not copied —
            or one bag [N, D], or ragged [T, D] with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        v_weight, u_weight: [L, D]; ``u_weight=None`` leaves out the gate (plain attention).
        v_bias, u_bias: [L] or None.
        w_weight, w_bias: [K, L] for K heads, and [K] or None. The weights share one dtype; if it is not h's, as with
            float32 weights and bfloat16 features, products are formed in the dtype that the two promote to.
        mask: [B, N] ([N] for one bag), bool or 0/1 of any dtype, True where the instance is real. A masked instance has
            weight and gradient 0, whatever values ``h`` has there. Dense bags only.
        key_padding_mask: the inverse of ``mask``, True where the instance is padding, as in
            ``torch.nn.MultiheadAttention``. Give at most one of the two.
        cu_seqlens: [B+1] int32 or int64, from 0 to T without falling; bag b is ``h[cu_seqlens[b]:cu_seqlens[b + 1]]``.
        activation: of the first branch, "tanh", "relu" or "gelu" (by erf). The gate always is a sigmoid.
        dropout_p: probability with which each hidden unit of either branch is dropped, independently for each instance,
            in steps of 1 / 65536; kept units are divided by 1 - p. Pass 0 for evaluation.
        generator: draws the seed of the dropout, on h's device; None is torch's own, so that ``torch.manual_seed``
            reproduces it and ``torch.utils.checkpoint`` computes the same mask again.
        masked_score: the score of masked instances, finite or -inf, without effect on pooled; it has no gradient.
        backend: one of ``ercn.ops.backends()``; None takes ``use_backend``, ``ERCN_BACKEND`` or the first that can run.

    Returns:
        pooled: z, [B, K, D] in the dtype that h and the weights promote to.
        scores: s before the softmax, [B, K, N] or [K, T]; float64 if an input is, else float32.
        For one bag [N, D] both are without B. An empty or fully masked bag gives pooled 0 and zero gradients; on the
        CPU, a mask without any real instance warns. Gradients flow through both outputs.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, or an unknown backend.
        RuntimeError: the named backend cannot run these tensors; the message says why.

    Derivatives of any order exist in reverse and forward mode, as do ``vmap`` and the transforms of ``torch.func``,
    which except for ``vmap`` break the graph of torch.compile. Beyond the first gradient, which the kernels compute,
    they are plain torch on every backend, with O(N·L) memory.

    FLOPs are 4·B·N·D·L for the projections (2·B·N·D·L without the gate) and 2·B·N·K·(L + D). No [N, L] activation and
    no dropout mask is saved: the backward computes them again. Two runs on one machine are bit-equal, with dropout
    under the same seed. Under autocast all floating inputs except float64 are cast.

    Dropout is Philox4x32-10 with one seed for each call, ``torch.randint(2**62, (1,))``. Instance i (b·N + n, or the
    ragged row) and hidden unit l take word (l // 16) % 4 of the counter (i mod 2³², i // 2³², (l // 64)·16 + l % 16,
    0). If its low 16 bits are below round(65536·p), V's unit is dropped; if its high 16 bits are, U's. So the mask does
    not depend on the backend, the number of threads or the instruction set.

    Sources: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018; Salmon, Moraes, Dror,
    Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> import torch
    >>> from ercn.ops import gated_attention_pool
    >>> fmap = torch.ones(2, 8, 3, 3)                                # every element is an instance
    >>> h = fmap.flatten(2).transpose(1, 2)                          # [B=2, N=9, D=8], a view
    >>> v, u, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(1, 4)
    >>> pooled, scores = gated_attention_pool(h, v, None, u, None, w, None)
    >>> pooled.shape, scores.shape, torch.allclose(pooled, torch.ones(2, 1, 8))
    (torch.Size([2, 1, 8]), torch.Size([2, 1, 9]), True)
    """
    raw = PoolArguments(
        h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, None, dropout_p, activation
    )
    one_bag, mask, args = _prepared(raw, key_padding_mask, generator, masked_score)
    pooled, scores = _gated_attention_pool(*args, _backends.requested(backend))
    if mask is not None and masked_score != _MASKED:
        scores = scores.masked_fill(~mask.unsqueeze(1), masked_score)
    return (pooled.squeeze(0), scores.squeeze(0)) if one_bag else (pooled, scores)


def attention_scores(
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    masked_score: float = _MASKED,
    backend: str | None = None,
) -> Tensor:
    """Only the scores of ``gated_attention_pool``, before the softmax, without pooling in forward and backward.

        s_k = w · (drop(tanh(V h_k + b_V)) ⊙ drop(σ(U h_k + b_U))) + b_w

    ``pool_by_scores`` of them is the pool again. Between the two, scores can be changed (top-k masks, gates), and other
    values than h can be pooled (separate values, logits of each instance, classes with their own attention). If the
    scores and the pooled h are needed unchanged, ``gated_attention_pool`` reads h once for both.

    Args: as ``gated_attention_pool``.

    Returns:
        [B, K, N], [K, T] with ``cu_seqlens`` or [K, N] of one bag, with ``masked_score`` where masked; float64 if an
        input is, else float32.

    Raises:
        ValueError, RuntimeError: as ``gated_attention_pool``.

    FLOPs are those of the projections and 2·B·N·K·L. Derivatives, determinism, dropout and source as
    ``gated_attention_pool``.

    >>> import torch
    >>> from ercn.ops import attention_scores
    >>> h, v, w = torch.tensor([[0.0], [20.0]]), torch.ones(1, 1), torch.ones(1, 1)     # one bag of two instances
    >>> attention_scores(h, v, None, None, None, w, None)
    tensor([[0., 1.]])
    """
    raw = PoolArguments(
        h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, None, dropout_p, activation
    )
    one_bag, mask, args = _prepared(raw, key_padding_mask, generator, masked_score)
    scores = _attention_scores(*args, _backends.requested(backend))
    if mask is not None and masked_score != _MASKED:
        scores = scores.masked_fill(~mask.unsqueeze(1), masked_score)
    return scores.squeeze(0) if one_bag else scores


def pool_by_scores(
    scores: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool values of instances by scores, those of ``attention_scores`` or any others.

        a = softmax_k(s),   z = Σ_k a_k value_k

    Args:
        scores: s, [B, K, N], [K, T] with ``cu_seqlens`` or [K, N] for one bag; floating point. -inf gives weight 0. A
            bag with no other score gives NaN, as any softmax does; only a mask avoids it.
        value: [B, N, D], [T, D] or [N, D], any strides and floating dtype.
        mask, key_padding_mask: as ``gated_attention_pool``. Scores and values of masked instances have no effect.
        cu_seqlens, backend: as ``gated_attention_pool``.

    Returns:
        pooled: z, [B, K, D] ([K, D] of one bag) in value's dtype; sums are float64 if an input is, else float32. An
        empty or fully masked bag gives 0 and zero gradients. Differentiable in scores and value.

    Raises:
        ValueError, RuntimeError: as ``gated_attention_pool``.

    FLOPs are 2·B·N·K·D; value is read once, and once more in the backward. Derivatives as ``gated_attention_pool``. Two
    runs on one machine are bit-equal. Under autocast ``value`` is cast to autocast's dtype and ``scores`` is not.

    >>> import torch
    >>> from ercn.ops import pool_by_scores
    >>> pool_by_scores(torch.zeros(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))     # one bag, the mean of two
    tensor([[2., 3.]])
    """
    one_bag = cu_seqlens is None and value.dim() == 2
    dims = 2 if one_bag or cu_seqlens is not None else 3
    if value.dim() != dims or scores.dim() != dims or scores.shape[-1] != value.shape[-2] or (
        dims == 3 and scores.shape[0] != value.shape[0]
    ):
        raise ValueError(
            "scores must be [B, K, N] with value [B, N, D], [K, N] with one bag [N, D], or ragged [K, T] with "
            f"value [T, D] and cu_seqlens; got scores {list(scores.shape)}, value {list(value.shape)}"
            + ("" if cu_seqlens is None else " and cu_seqlens")
        )
    if not (scores.is_floating_point() and value.is_floating_point()):
        raise ValueError(f"scores and value must be floating point; got {scores.dtype} and {value.dtype}")
    if scores.device != value.device:
        raise ValueError(f"scores and value must be on one device; got {scores.device} and {value.device}")
    if cu_seqlens is not None:
        _check_bounds(value, cu_seqlens)
    mask = _real_instances(value, mask, key_padding_mask, cu_seqlens)
    if one_bag:
        scores, value = scores.unsqueeze(0), value.unsqueeze(0)
    pooled = _pool_by_scores(scores, value, mask, cu_seqlens, _backends.requested(backend))
    return pooled.squeeze(0) if one_bag else pooled


def _prepared(
    p: PoolArguments, key_padding_mask: Tensor | None, generator: torch.Generator | None, masked_score: float
) -> tuple[bool, Tensor | None, Sequence[Any]]:
    """Whether h is one bag, the mask of real instances, and the checked arguments of the op."""
    _check(p)
    h, dropout_p = p.h, p.dropout_p
    if p.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {p.activation!r}")
    if not masked_score < math.inf:
        raise ValueError(f"masked_score must be finite or -inf; got {masked_score}")
    mask = _real_instances(h, p.mask, key_padding_mask, p.cu_seqlens)
    seed = None if dropout_p == 0 and generator is None else _seed(h, dropout_p, generator)
    one_bag = p.cu_seqlens is None and h.dim() == 2
    if not one_bag and mask is None and seed is None and type(dropout_p) is float:
        return one_bag, mask, p
    args: list[Any] = [*p]  # _replace would take 1 µs more
    args[_H] = h.unsqueeze(0) if one_bag else h
    args[_MASK], args[_SEED], args[_DROPOUT_P] = mask, seed, float(dropout_p)
    return one_bag, mask, args


def _seed(h: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1; got {dropout_p}")
    if dropout_p == 0:
        raise ValueError("generator was given, but dropout_p is 0: nothing is drawn")
    if _library.is_sharded(h):
        raise ValueError(f"dropout_p must be 0 with DTensors, where each rank would draw its own; got {dropout_p}")
    device = h.device
    if generator is None:
        return torch.randint(1 << 62, (1,), device=device)
    if generator.device.type != device.type or generator.device.index not in (None, device.index):
        raise ValueError(f"generator must be on h's device {device}; it is on {generator.device}")
    return torch.randint(1 << 62, (1,), device=device, generator=generator)


_POLARITY = {
    "mask": "mask is True where the instance is real, key_padding_mask where it is padding",
    "key_padding_mask": "key_padding_mask is True where the instance is padding, mask where it is real",
}


def _real_instances(
    h: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """bool [B, N] of either mask, True where the instance is real. Values are checked on the CPU only."""
    if mask is not None:
        if key_padding_mask is not None:
            raise ValueError(f"give mask or key_padding_mask, not both: {_POLARITY['mask']}")
        name, given = "mask", mask
    elif key_padding_mask is not None:
        name, given = "key_padding_mask", key_padding_mask
    else:
        return None
    if cu_seqlens is not None:
        raise ValueError(f"{name} is for dense bags [B, N, D]; ragged bags leave instances out instead")
    if given.shape != h.shape[:-1] or given.device != h.device:
        raise ValueError(
            f"{name} must be bool or 0/1 {list(h.shape[:-1])} on {h.device}; "
            f"got {given.dtype} {list(given.shape)} on {given.device}"
        )
    readable = _library.is_readable(given)
    real = given
    if given.dtype != torch.bool:
        real = torch.ne(given, 0)
        if readable and (wrong := given[real & (given != 1)]).numel() > 0:
            raise ValueError(
                f"{name} must hold 0 and 1 alone; got {wrong[0].item()}, as one that is added to scores has it. "
                f"{_POLARITY[name]}"
            )
    if name == "key_padding_mask":
        real = ~real
    if readable and real.numel() > 0 and not real.any():
        _warn_once(f"{name} masks all {real.numel()} instances: pooled is 0. {_POLARITY[name]}")
    return real.unsqueeze(0) if real.dim() == 1 else real


_warned: set[tuple[str, int]] = set()  # files and lines


def _warn_once(message: str) -> None:
    """Warn at the nearest caller outside of ercn and torch, once for each calling line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ercn", "torch"):
        frame = frame.f_back
    site = (frame.f_code.co_filename, frame.f_lineno)
    if site not in _warned:
        _warned.add(site)
        warnings.warn_explicit(message, UserWarning, *site)


def _check(p: PoolArguments) -> None:
    h, v_weight, w_weight = p.h, p.v_weight, p.w_weight
    of_h, of_v, of_w = h.shape, v_weight.shape, w_weight.shape
    if len(of_h) != 2 and (len(of_h) != 3 or p.cu_seqlens is not None):
        raise ValueError(
            "h must be [B, N, D], one bag [N, D], or ragged [T, D] with cu_seqlens; "
            f"got {list(of_h)}{'' if p.cu_seqlens is None else ' with cu_seqlens'}"
        )
    if len(of_v) != 2 or len(of_w) != 2:
        raise ValueError(f"v_weight must be [L, D] and w_weight [K, L]; got {list(of_v)} and {list(of_w)}")
    if p.u_weight is None and p.u_bias is not None:
        raise ValueError("u_bias must be None where u_weight is None (plain attention)")
    if not (h.is_floating_point() and v_weight.is_floating_point()):
        raise ValueError(f"h and v_weight must be floating point; got {h.dtype} and {v_weight.dtype}")
    hidden, heads, dim = of_v[0], of_w[0], of_h[-1]
    shapes = (hidden, dim), (hidden,), (hidden, dim), (hidden,), (heads, hidden), (heads,)
    device, dtype = h.device, v_weight.dtype
    weights: Any = p[1:]
    for name, x, shape in zip(_WEIGHTS, weights, shapes):
        if x is None:
            continue
        if x.shape != shape:
            sizes = f"D = {of_v[1]}, L = {hidden}, K = {heads}"
            raise ValueError(f"{name} must be {list(shape)} for {sizes}; got {list(x.shape)}")
        if x.dtype is not dtype and (torch.float64 in (x.dtype, dtype) or not _library.autocasts(device)):
            raise ValueError(f"{name} must have v_weight's dtype {dtype} outside autocast; got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on h's device {device}; got {x.device}")
    if p.cu_seqlens is not None:
        _check_bounds(h, p.cu_seqlens)


def _check_bounds(h: Tensor, cu_seqlens: Tensor) -> None:
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != h.device:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [B+1] on {h.device}; "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if _library.is_readable(cu_seqlens):
        bag_slices(cu_seqlens, h.shape[0])


def _bags(h: Tensor, cu_seqlens: Tensor | None) -> int:
    return h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_scores(*args: Any) -> Tensor:
    p, _ = PoolArguments.split(args)
    heads = p.w_weight.shape[0]
    shape = (p.h.shape[0], heads, p.h.shape[1]) if p.cu_seqlens is None else (heads, p.h.shape[0])
    return p.h.new_empty(shape, dtype=accumulate_dtype(p.h, p.v_weight))


def _fake_pool(*args: Any) -> tuple[Tensor, Tensor]:
    p, _ = PoolArguments.split(args)
    dtype = torch.promote_types(p.h.dtype, p.v_weight.dtype)
    shape = _bags(p.h, p.cu_seqlens), p.w_weight.shape[0], p.h.shape[-1]
    return p.h.new_empty(shape, dtype=dtype), _fake_scores(*args)


def _fake_pool_backward(grad_pooled: Tensor | None, grad_scores: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p, (_, needs, *_) = PoolArguments.split(args)
    inputs = (getattr(p, name) for name in DIFFERENTIABLE)
    return tuple(
        p.h.new_empty(0) if x is None else x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needs)
    )


def _fake_by_scores(
    scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, backend: str = ""
) -> Tensor:
    return value.new_empty(_bags(value, cu_seqlens), scores.shape[-2], value.shape[-1])


def _fake_by_scores_backward(
    grad_pooled: Tensor, scores: Tensor, value: Tensor, mask: Any, cu_seqlens: Any, needs: list[bool], backend: str = ""
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip((scores, value), needs))


_POOL = _library.define(f'gated_attention_pool({SCHEMA}, str backend="") -> (Tensor pooled, Tensor scores)', _fake_pool)
_POOL_BACKWARD = _library.define(
    f"gated_attention_pool_backward(Tensor? grad_pooled, Tensor? grad_scores, {SCHEMA}, Tensor scores, "
    f'bool[] needs, str backend="") -> ({", ".join(f"Tensor grad_{name}" for name in DIFFERENTIABLE)})',
    _fake_pool_backward,
)
_SCORES = _library.define(f'attention_scores({SCHEMA}, str backend="") -> Tensor scores', _fake_scores)
_BY_SCORES = _library.define(
    'pool_by_scores(Tensor scores, Tensor value, Tensor? mask, Tensor? cu_seqlens, str backend="") -> Tensor pooled',
    _fake_by_scores,
)
_BY_SCORES_BACKWARD = _library.define(
    "pool_by_scores_backward(Tensor grad_pooled, Tensor scores, Tensor value, Tensor? mask, Tensor? cu_seqlens, "
    'bool[] needs, str backend="") -> (Tensor grad_scores, Tensor grad_value)',
    _fake_by_scores_backward,
)


def _nones_from(op: torch._ops.OpOverload, name: str) -> tuple[None, ...]:
    """The gradients of the arguments from ``name`` on, which have none."""
    return (None,) * (len(op._schema.arguments) - position(op._opname, name))


def _needed(grads: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs)]


class _Scored(torch.autograd.Function):
    """What ``gated_attention_pool`` and ``attention_scores`` share."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.settings, ctx.backend = inputs[TENSORS], inputs[SETTINGS], inputs[-1]
        ctx.save_for_backward(*tensors, output[-1] if isinstance(output, tuple) else output)
        _library.save_for_forward(ctx, *tensors)
        ctx.set_materialize_grads(False)


class _Pool(_Scored):
    no_gradients = _nones_from(_POOL, "mask")

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_pooled is None and grad_scores is None:
            return (*(None for _ in DIFFERENTIABLE), *_Pool.no_gradients)
        *tensors, scores = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        rest = *ctx.settings, scores, needs, ctx.backend
        grads = _gated_attention_pool_backward(grad_pooled, grad_scores, *tensors, *rest)
        return (*_needed(grads, needs), *_Pool.no_gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return _derivative.push(reference.gated_attention_pool, (*ctx.saved_tensors, *ctx.settings), tangents[:-1])


class _Scores(_Scored):
    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Pool.backward(ctx, None, grad_scores)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return _derivative.push(reference.attention_scores, (*ctx.saved_tensors, *ctx.settings), tangents[:-1])


class _ByScores(torch.autograd.Function):
    no_gradients = _nones_from(_BY_SCORES, "mask")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        _library.save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])  # scores, value
        grads = _pool_by_scores_backward(grad_pooled, *ctx.saved_tensors, needs, ctx.backend)
        return (*_needed(grads, needs), *_ByScores.no_gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return _derivative.push(reference.pool_by_scores, ctx.saved_tensors, tangents[:-1])


class _BackwardOp(torch.autograd.Function):
    """A backward op: its derivatives are those of ``gradient``, which differentiates the reference."""

    no_gradients: tuple[None, ...]

    @staticmethod
    def gradient(ctx: Any) -> tuple[_derivative.Gradient, Sequence[Any]]:
        """The gradients that the op computes, as a function, and its differentiable arguments."""
        raise NotImplementedError

    @classmethod
    def backward(cls, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, args = cls.gradient(ctx)
        return (*gradient.pull(args, cotangents, ctx.needs_input_grad), *cls.no_gradients)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        gradient, args = cls.gradient(ctx)
        return gradient.push(args, tangents)


class _PoolBackward(_BackwardOp):
    no_gradients = _nones_from(_POOL_BACKWARD, "mask")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_pooled, grad_scores, *args = inputs
        _, (_, ctx.needs, _) = PoolArguments.split(args)
        tensors, ctx.settings = args[TENSORS], args[SETTINGS]
        ctx.save_for_backward(grad_pooled, grad_scores, *tensors)
        _library.save_for_forward(ctx, grad_pooled, grad_scores, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def gradient(ctx: Any) -> tuple[_derivative.Gradient, Sequence[Any]]:
        """The scores, which the op takes too, are computed again as a function of h."""
        grad_pooled, grad_scores, *tensors = ctx.saved_tensors
        count = len(DIFFERENTIABLE)
        inputs, constants = tensors[:count], (*tensors[count:], *ctx.settings)
        pool = lambda *inputs: reference.gated_attention_pool(*inputs, *constants)
        upstream = grad_pooled, grad_scores
        return _derivative.Gradient(pool, upstream, ctx.needs), (*upstream, *inputs)


class _ByScoresBackward(_BackwardOp):
    no_gradients = _nones_from(_BY_SCORES_BACKWARD, "mask")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.needs, _ = inputs
        ctx.save_for_backward(*tensors)
        _library.save_for_forward(ctx, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def gradient(ctx: Any) -> tuple[_derivative.Gradient, Sequence[Any]]:
        grad_pooled, scores, value, mask, cu_seqlens = ctx.saved_tensors
        pool = lambda scores, value: (reference.pool_by_scores(scores, value, mask, cu_seqlens),)
        return _derivative.Gradient(pool, (grad_pooled,), ctx.needs), (grad_pooled, scores, value)


def _map_bags(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """vmap as more bags, if only h and mask are batched. Dropout is a loop: it numbers the instances of each call."""
    p, rest = PoolArguments.split(args)
    dims: Any = PoolArguments.split(in_dims)[0]
    if p.cu_seqlens is None and p.seed is None and all(getattr(dims, name) is None for name in _WEIGHTS):
        h, mask = (_library.fold(dim, info.batch_size, x) for dim, x in ((dims.h, p.h), (dims.mask, p.mask)))
        return _library.unfold(op(*p._replace(h=h, mask=mask), *rest), info.batch_size)
    return _library.loop(op, info, in_dims, *args)


def _map_values(
    op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...],
    scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *rest: str,
) -> tuple[Any, Any]:  # fmt: skip
    if cu_seqlens is not None:
        return _library.loop(op, info, in_dims, scores, value, mask, cu_seqlens, *rest)
    folded = (_library.fold(dim, info.batch_size, x) for dim, x in zip(in_dims, (scores, value, mask)))
    return _library.unfold(op(*folded, None, *rest), info.batch_size)


_gated_attention_pool: Callable[..., tuple[Tensor, Tensor]] = _library.join(_POOL, _Pool, _map_bags, DIFFERENTIABLE)
_gated_attention_pool_backward = _library.join(_POOL_BACKWARD, _PoolBackward, _library.loop)
_attention_scores: Callable[..., Tensor] = _library.join(_SCORES, _Scores, _map_bags, DIFFERENTIABLE)
_pool_by_scores: Callable[..., Tensor] = _library.join(_BY_SCORES, _ByScores, _map_values, ("value",))
_pool_by_scores_backward = _library.join(_BY_SCORES_BACKWARD, _ByScoresBackward, _library.loop)


@register_flop_formula(torch.ops.ercn.gated_attention_pool)
def _(*args: Any, **kwargs: Any) -> int:
    return _projection_flops(*args) + _narrow_flops(*args)


@register_flop_formula(torch.ops.ercn.attention_scores)
def _(*args: Any, **kwargs: Any) -> int:
    return _projection_flops(*args) + _narrow_flops(*args, pooled=False)


@register_flop_formula(torch.ops.ercn.gated_attention_pool_backward)
def _(grad_pooled: torch.Size | None, grad_scores: torch.Size | None, *args: Any, **kwargs: Any) -> int:
    """The projections again, one product of their size for the weights and one for h, if needed."""
    _, (_, needs, *_) = PoolArguments.split(args)
    needed = dict(zip(DIFFERENTIABLE, needs))
    products = 1 + int(needed["v_weight"] or needed["u_weight"]) + int(needed["h"])
    return products * _projection_flops(*args) + 2 * _narrow_flops(*args, pooled=grad_pooled is not None)


@register_flop_formula(torch.ops.ercn.pool_by_scores)
def _(scores: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(scores) * value[-1]


@register_flop_formula(torch.ops.ercn.pool_by_scores_backward)
def _(
    grad_pooled: torch.Size, scores: torch.Size, value: torch.Size, mask: Any, cu_seqlens: Any, needs: list[bool],
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return sum(needs) * 2 * math.prod(scores) * value[-1]


def _projection_flops(*args: Any) -> int:
    shapes: Any = PoolArguments.split(args)[0]
    projections = 1 if shapes.u_weight is None else 2
    flops: int = 2 * projections * math.prod((*shapes.h[:-1], *shapes.v_weight))
    return flops


def _narrow_flops(*args: Any, pooled: bool = True) -> int:
    shapes: Any = PoolArguments.split(args)[0]
    (heads, hidden), (*instances, dim) = shapes.w_weight, shapes.h
    flops: int = 2 * math.prod((*instances, heads, hidden + dim if pooled else hidden))
    return flops
