"""Derivatives of an op beyond its first gradient, from a plain-torch function of the same value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def pull(function: Callable, args: Sequence[Any], cotangents: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """Of every argument its gradient, differentiable in turn, for cotangents of what ``function`` returns; None where
    there is no argument or it is not needed."""
    wanted = [i for i, need in enumerate(needs) if need and args[i] is not None]
    grads: list[Tensor | None] = [None] * len(args)
    if wanted:
        _, pullback = torch.func.vjp(_of(function, args, wanted), *(args[i] for i in wanted))
        for i, grad in zip(wanted, pullback(cotangents)):
            grads[i] = grad
    return grads


def push(function: Callable, args: Sequence[Any], tangents: Sequence[Tensor | None]) -> Any:
    """The tangents of what ``function`` returns: the gradient is linear in its cotangents, and its adjoint pushes."""
    moved = [i for i, (x, tangent) in enumerate(zip(args, tangents)) if x is not None and tangent is not None]
    outputs, pullback = torch.func.vjp(_of(function, args, moved), *(args[i] for i in moved))
    _, pushforward = torch.func.vjp(pullback, tree_map(torch.zeros_like, outputs))
    return pushforward(tuple(tangents[i] for i in moved))[0]


def _of(function: Callable, args: Sequence[Any], which: list[int]) -> Callable:
    """``function`` of these arguments alone."""

    def of_them(*values):
        every = list(args)
        for i, value in zip(which, values):
            every[i] = value
        return function(*every)

    return of_them


class Gradient:
    """What a backward op computes, as a differentiable function of the upstream gradients and the inputs.

    function: of ``inputs`` inputs, returns a tuple of outputs, one for each upstream gradient.
    needs: which inputs have a gradient.
    """

    def __init__(self, function: Callable, upstream: Sequence[Tensor | None], needs: Sequence[bool]):
        self.function, self.needs, self.count = function, needs, len(upstream)
        self.given = [i for i, grad in enumerate(upstream) if grad is not None]

    def __call__(self, *args: Tensor | None) -> list[Tensor | None]:
        upstream, inputs = args[: self.count], args[self.count :]

        def outputs(*inputs):
            found = self.function(*inputs)
            return tuple(found[i] for i in self.given)

        return pull(outputs, inputs, tuple(upstream[i] for i in self.given), self.needs)

    def pull(self, args: Sequence[Any], cotangents: Sequence[Tensor | None], needs: Sequence[bool]):
        """``pull`` of the gradients that have a cotangent."""
        kept = [i for i, cotangent in enumerate(cotangents) if cotangent is not None and self._has(args, i)]
        if not kept:
            return [None] * len(args)
        return pull(lambda *args: self._kept(args, kept), args, tuple(cotangents[i] for i in kept), needs[: len(args)])

    def push(self, args: Sequence[Any], tangents: Sequence[Tensor | None], outputs: int):
        """``push``, with an empty tensor for what is no gradient."""
        kept = [i for i in range(outputs) if self._has(args, i)]
        found = iter(push(lambda *args: self._kept(args, kept), args, tangents[: len(args)]))
        like = next(x for x in args if x is not None)
        return tuple(next(found) if i in kept else like.new_zeros(0) for i in range(outputs))

    def _has(self, args: Sequence[Any], i: int) -> bool:
        return self.needs[i] and args[self.count + i] is not None

    def _kept(self, args: Sequence[Any], kept: list[int]) -> tuple[Tensor, ...]:
        grads = self(*args)
        return tuple(grads[i] for i in kept)
