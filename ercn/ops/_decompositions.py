"""The operators as plain torch without mutation, for programs that run without ercn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ercn.ops import reference
from ercn.ops._arguments import PoolArguments
from ercn.ops.reference import accumulate_dtype

_BLOCK_ELEMENTS = 1 << 24  # of the affinity of a picture at once: 64 MiB of float32


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Plain-torch forms of the forward operators, for ``torch.export.ExportedProgram.run_decompositions``.

    A decomposed program contains torch's own operators only: it runs where ``ercn`` is not installed, and
    ``torch.onnx.export`` and AOTInductor accept it. The formulas are those of the operators, the last bits may differ.
    The number of pictures or bags may stay symbolic, N may not. Operators of gradients have no decomposition: exported
    programs are for inference. Memory for each picture: at most 2²⁴ elements or 16 columns, whichever is more, of the
    affinity at once; the two [N, L] activations of the pool; the weights of all neighbours of a refinement, whose steps
    are one loop.

    Raises (while decomposing):
        NotImplementedError: ragged bags (``cu_seqlens``), whose lengths are data.

    >>> import torch
    >>> from ercn.nn import GatedAttentionPool
    >>> from ercn.ops import decompositions
    >>> bags = torch.randn(2, 9, 8)
    >>> program = torch.export.export(GatedAttentionPool(8, 4).eval(), (bags,)).run_decompositions(decompositions())
    >>> any("ercn" in str(node.target) for node in program.graph.nodes), len(program.module()(bags))
    (False, 2)
    """
    return {getattr(torch.ops.ercn, name).default: form for name, form in _FORMS.items()}


def _relu_affinity(value: Tensor, feat: Tensor, backend: str = "") -> Tensor:
    acc = accumulate_dtype(value, feat)
    value, feat = value.to(acc), feat.to(acc)
    size = max(16, _BLOCK_ELEMENTS // feat.shape[2])
    return torch.cat([value @ torch.relu(feat.mT @ columns) for columns in feat.split(size, 2)], 2)


def _attention_scores(*args: Any) -> Tensor:
    p, _ = PoolArguments.split(args)
    _refuse_ragged(p.cu_seqlens)
    branches, acc = reference.Branches(p), accumulate_dtype(p.h, p.v_weight)
    t, s = branches(reference.zero_masked(p.h, p.mask).to(acc), slice(0, p.h.shape[1]))
    w_bias = None if p.w_bias is None else p.w_bias.to(acc)
    scores = linear(t if s is None else t * s, p.w_weight.to(acc), w_bias).mT.contiguous()
    return scores if p.mask is None else scores.masked_fill(~p.mask.unsqueeze(1), float("-inf"))


def _pool(scores: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulate_dtype(scores, value)
    return reference.attention(scores.to(acc), mask) @ reference.zero_masked(value, mask).to(acc)


def _pool_by_scores(
    scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, backend: str = ""
) -> Tensor:
    _refuse_ragged(cu_seqlens)
    return _pool(scores, value, mask).to(value.dtype)


def _gated_attention_pool(*args: Any) -> tuple[Tensor, Tensor]:
    (p, _), scores = PoolArguments.split(args), _attention_scores(*args)
    return _pool(scores, p.h, p.mask).to(torch.promote_types(p.h.dtype, p.v_weight.dtype)), scores


def _refuse_ragged(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError("ragged bags (cu_seqlens) have no decomposition, their lengths are data")


def _pixel_adaptive_refinement(
    cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str, backend: str = ""
) -> Tensor:
    acc = accumulate_dtype(cam, image)
    weights = _adaptive_weights(image.to(acc), dilations, form)
    offsets = reference.ring_offsets(reference.near(dilations, image))
    return _propagate(cam.to(acc), weights, offsets, steps, "replicate").to(cam.dtype)


def _adaptive_weights(image: Tensor, dilations: Sequence[int], form: str) -> Tensor:
    """[B, 8·len(dilations), 1, H, W]."""
    offsets = reference.ring_offsets(reference.near(dilations, image))
    differences = [neighbour - image for neighbour in reference.shifted(image, offsets, "replicate")]
    own = 0 if form == "par" else len(dilations)  # times that pixel i itself counts
    count = len(differences) + own
    mean = _sum(differences) / count
    spread = _sum([(d - mean).square() for d in differences])
    deviation = ((spread + own * mean.square()) / (count - 1)).sqrt()
    if form == "par":
        scale = -1 / (image.shape[1] * (0.3 * (deviation + 1e-8)).square())
        differences = [d.square() * scale for d in differences]
    else:
        scale = -1 / (image.shape[1] * (1e-8 + 0.1 * deviation))
        differences = [d.abs() * scale for d in differences]
    weights = torch.stack([d.sum(1, keepdim=True) for d in differences], 1).softmax(1)
    if form == "par":
        weights = weights + reference.position_weights(dilations).to(weights)[:, None, None, None]
    return weights


def _random_walk(
    value: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, backend: str = ""
) -> Tensor:
    acc = accumulate_dtype(value, affinity)
    half = reference.half_disc(radius)
    inside = reference.shifted(affinity.new_ones(1, 1, *affinity.shape[2:]), half, "constant")
    pairs = (affinity.to(acc) ** beta).split(1, 1)
    after = [torch.where(there > 0, pair, 0) for there, pair in zip(inside, pairs)]
    before = [reference.shifted(pair, [(-dy, -dx)], "constant")[0] for pair, (dy, dx) in zip(after, half)]
    weights = torch.stack([*reversed(before), torch.ones_like(after[0]), *after], 1)  # [B, 2P + 1, 1, H, W]
    weights = weights / weights.sum(1, keepdim=True)
    return _propagate(value.to(acc), weights, reference.disc(radius), steps, "constant").to(value.dtype)


def _sum(tensors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _propagate(map_: Tensor, weights: Tensor, offsets: list[tuple[int, int]], steps: int, mode: str) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop_op

    def step(i: Tensor, m: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, _sum([w * x for w, x in zip(weights.unbind(1), reference.shifted(m, offsets, mode))])

    # One loop: unrolled, the steps would be thousands of operators and take minutes to compile.
    start = torch.zeros((), dtype=torch.int64, device=map_.device)
    first = map_.clone(memory_format=torch.contiguous_format)
    loop: Callable[..., tuple[Tensor, Tensor]] = while_loop_op
    return loop(lambda i, m, weights: i < steps, step, (start, first), (weights,))[1]


_FORMS: dict[str, Callable[..., Any]] = {
    "attention_scores": _attention_scores,
    "gated_attention_pool": _gated_attention_pool,
    "pixel_adaptive_refinement": _pixel_adaptive_refinement,
    "pool_by_scores": _pool_by_scores,
    "random_walk": _random_walk,
    "relu_affinity": _relu_affinity,
}
