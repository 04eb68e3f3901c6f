"""first_backward.py BACKEND DEVICE: the first call of the backend in this process is the pool's backward, by autograd.

On a GPU autograd runs it in a thread of its own, which has had no part in any CUDA call of ours. Prints what differs.
"""

from __future__ import annotations

import sys

import torch

import ercn.ops  # noqa: F401  (registers the operators)
from ercn.benchmarks.exact import differences, expected_pool, pool
from ercn.ops._arguments import DIFFERENTIABLE


def main(backend: str, device: str) -> None:
    p = pool(264, 64, 64, 2, torch.bfloat16, device)
    expected = expected_pool(p)

    class Known(torch.autograd.Function):
        """The known outputs."""

        @staticmethod
        def forward(ctx, *inputs):
            return expected["pooled"].clone(), expected["scores"].clone()

        @staticmethod
        def backward(ctx, *grads):
            return torch.ops.ercn.gated_attention_pool_backward(
                *grads, *p.inputs, None, None, None, 0.0, "tanh", expected["scores"], [True] * len(p.inputs), backend
            )

    leaves = [x.detach().requires_grad_() for x in p.inputs]
    grads = torch.autograd.grad(Known.apply(*leaves), leaves, (p.grad_pooled, p.grad_scores))
    found = {f"grad_{name}": grad for name, grad in zip(DIFFERENTIABLE, grads)}
    print(differences(found, {name: expected[name] for name in found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
