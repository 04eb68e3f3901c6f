"""Derivatives of an op beyond its first gradient, by ``torch.func`` of its plain-torch definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Function = Callable[..., Any]


def pull(function: Function, args: Sequence[Any], cotangents: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each argument for the cotangents of the outputs of ``function``, differentiable in turn; None
    where the argument is absent or its gradient not needed."""
    wanted = [i for i, need in enumerate(needs) if need and args[i] is not None]
    grads: list[Tensor | None] = [None] * len(args)
    if wanted:
        pullback = _vjp(function, args, wanted)[1]
        for i, grad in zip(wanted, pullback(cotangents)):
            grads[i] = grad
    return grads


def push(function: Function, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> Any:
    """The tangents of the outputs of ``function``: the adjoint of ``pull``, which is linear in its cotangents."""
    moved = [i for i, (x, tangent) in enumerate(zip(args, tangents)) if x is not None and tangent is not None]
    outputs, pullback = _vjp(function, args, moved)
    pushforward = torch.func.vjp(pullback, tree_map(torch.zeros_like, outputs))[1]
    return pushforward(tuple(tangents[i] for i in moved))[0]


def _vjp(function: Function, args: Sequence[Any], which: list[int]) -> tuple[Any, Function]:
    """``torch.func.vjp`` of ``function`` with respect to ``args[i]`` for i in ``which``."""

    def partial(*values: Tensor) -> Any:
        replaced = list(args)
        for i, value in zip(which, values):
            replaced[i] = value
        return function(*replaced)

    outputs, pullback, *_ = torch.func.vjp(partial, *(args[i] for i in which))
    return outputs, pullback


class Gradient:
    """The gradients that a backward op computes, as a differentiable function of upstream gradients and inputs.

    function: the forward; returns a tuple with one output for each upstream gradient.
    needs: which inputs have a gradient.
    """

    def __init__(self, function: Function, upstream: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        self.function, self.needs, self.count = function, needs, len(upstream)
        self.given = [i for i, grad in enumerate(upstream) if grad is not None]

    def pull(
        self, args: Sequence[Any], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """``pull`` of the gradients; one without a cotangent is left out."""
        kept = [i for i, cotangent in enumerate(cotangents) if cotangent is not None and self._has(args, i)]
        if not kept:
            return [None] * len(args)
        return pull(self._gradients(kept), args, tuple(cotangents[i] for i in kept), needs[: len(args)])

    def push(self, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """``push`` of the gradients, with an empty tensor for each input without one."""
        kept = [i for i in range(len(self.needs)) if self._has(args, i)]
        pushed = iter(push(self._gradients(kept), args, tangents[: len(args)]))
        like = next(x for x in args if x is not None)
        return tuple(next(pushed) if i in kept else like.new_zeros(0) for i in range(len(self.needs)))

    def _has(self, args: Sequence[Any], i: int) -> bool:
        return self.needs[i] and args[self.count + i] is not None

    def _gradients(self, kept: list[int]) -> Function:
        """Upstream gradients and inputs -> the gradients of the inputs ``kept``."""

        def outputs(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            every = self.function(*inputs)
            return tuple(every[i] for i in self.given)

        def gradients(*args: Tensor | None) -> tuple[Tensor | None, ...]:
            upstream, inputs = args[: self.count], args[self.count :]
            grads = pull(outputs, inputs, tuple(upstream[i] for i in self.given), self.needs)
            return tuple(grads[i] for i in kept)

        return gradients
