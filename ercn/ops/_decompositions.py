"""The operators as plain torch without mutation, for programs that leave the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ercn.ops import reference
from ercn.ops.reference import accumulate_dtype

_BLOCK_ELEMENTS = 1 << 24  # of the affinity at once, for each picture: 64 MiB of float32


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Plain-torch forms of the forward operators, for ``torch.export.ExportedProgram.run_decompositions``.

    A program decomposed by them has torch's own operators only, so that it runs where ``ercn`` is not installed, and
    ``torch.onnx.export`` and AOTInductor take it. The formulas are those of the operators, the last bits may differ.
    The number of pictures or bags may stay symbolic, N may not. Gradients' operators are not among them: what is
    exported is for inference. Memory for each picture: of the affinity at most 2²⁴ elements or 16 columns, whichever is
    more, at once; of the pool its two [N, L] activations; of the refinements, whose steps are one loop, the weights of
    all neighbours.

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
    ops = torch.ops.ercn
    return {getattr(ops, name).default: form for name, form in _FORMS.items()}


def _relu_affinity(value: Tensor, feat: Tensor, backend: str = "") -> Tensor:
    acc = accumulate_dtype(value, feat)
    value, feat = value.to(acc), feat.to(acc)
    size = max(16, _BLOCK_ELEMENTS // feat.shape[2])
    return torch.cat([value @ torch.relu(feat.mT @ columns) for columns in feat.split(size, 2)], 2)


def _attention_scores(
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
    backend: str = "",
) -> Tensor:
    _refuse_ragged(cu_seqlens)
    branches = reference._Branches(h, v_weight, v_bias, u_weight, u_bias, seed, dropout_p, activation)
    w, bw = reference._widen(branches.acc, w_weight, w_bias)
    t, s, *_ = branches(reference._real(h, mask).to(branches.acc), slice(0, h.shape[1]))
    scores = F.linear(t if s is None else t * s, w, bw).mT.contiguous()
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), float("-inf"))


def _pool(scores: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    acc = accumulate_dtype(scores, value)
    return reference._attention(scores.to(acc), mask) @ reference._real(value, mask).to(acc)


def _pool_by_scores(
    scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, backend: str = ""
) -> Tensor:
    _refuse_ragged(cu_seqlens)
    return _pool(scores, value, mask).to(value.dtype)


def _gated_attention_pool(h: Tensor, v_weight: Tensor, *rest) -> tuple[Tensor, Tensor]:
    scores = _attention_scores(h, v_weight, *rest)
    return _pool(scores, h, rest[5]).to(torch.promote_types(h.dtype, v_weight.dtype)), scores  # rest[5]: mask


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
    own = 0 if form == "par" else len(dilations)  # how often pixel i counts
    count = len(differences) + own
    mean = sum(differences) / count
    spread = sum((d - mean).square() for d in differences)
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


def _propagate(map_: Tensor, weights: Tensor, offsets: list[tuple[int, int]], steps: int, mode: str) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop_op

    def step(i: Tensor, m: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, sum(w * neighbour for w, neighbour in zip(weights.unbind(1), reference.shifted(m, offsets, mode)))

    # a loop over the steps: written out they would be thousands of operators, and minutes of compilation
    start = torch.zeros((), dtype=torch.int64, device=map_.device)
    first = map_.clone(memory_format=torch.contiguous_format)
    return while_loop_op(lambda i, m, weights: i < steps, step, (start, first), (weights,))[1]


_FORMS = {
    "attention_scores": _attention_scores,
    "gated_attention_pool": _gated_attention_pool,
    "pixel_adaptive_refinement": _pixel_adaptive_refinement,
    "pool_by_scores": _pool_by_scores,
    "random_walk": _random_walk,
    "relu_affinity": _relu_affinity,
}
