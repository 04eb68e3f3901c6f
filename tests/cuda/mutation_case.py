"""Runs the checks of test_mutations.py: mutation_case.py LIBRARY '[[number, check], …]'; prints [number, sentence]."""

from __future__ import annotations

import ctypes
import functools
import json
import sys

import torch

from ercn.benchmarks import exact
from ercn.ops._arguments import DIFFERENTIABLE

SEEDS = 3  # orders of threads and blocks


def affinity(ops, kernels: str, gradients: bool) -> str | None:
    value, feat, grad = exact.affinity(1, 22, 64, 2 * 128 * 3 + 3, torch.bfloat16)
    found = {"out": ops.relu_affinity_cuda(value, feat, False, kernels)}
    if gradients:
        found["grad_value"], found["grad_feat"] = ops.relu_affinity_backward_cuda(
            grad, value, feat, True, False, kernels
        )
    expected = exact.expected_affinity(value, feat, grad)
    return exact.differences(found, {name: expected[name] for name in found})


def pool(ops) -> str | None:
    """Ragged bags, more segments than a chunk of the backward, sums of more steps than there are stages."""
    p = exact.pool([0, 3, 67, 180, 0, 81, 89], 64, 192, 2, torch.bfloat16)
    arguments = (*p.inputs, p.mask, p.cu_seqlens)
    outputs = ops.gated_attention_pool_cuda(*arguments, None, 0.0, "tanh", False, "sm90")
    grads = ops.gated_attention_pool_backward_cuda(
        p.grad_pooled, p.grad_scores, *arguments, None, 0.0, "tanh", outputs[1], (1 << len(p.inputs)) - 1, False, "sm90"
    )
    names = ("pooled", "scores", *(f"grad_{name}" for name in DIFFERENTIABLE))
    return exact.differences(dict(zip(names, (*outputs, *grads), strict=True)), exact.expected_pool(p))


def tf32(ops) -> str | None:
    """One feature of 1 + 7/8 unit of TF32, rounded 1 + 1 unit: A is its square to 11 bits, out 16 times it."""
    unit = 2.0**-10
    out = ops.relu_affinity_cuda(torch.ones(1, 1, 16), torch.full((1, 1, 16), 1 + 7 / 8 * unit), False, "generic")
    right = 16 * (1 + unit) ** 2
    off = (out / right - 1).abs().max().item()
    return None if off < unit / 4 else f"TF32 words are off by {off:.1e}"


CHECKS = {
    "forward": functools.partial(affinity, kernels="sm90", gradients=False),
    "backward": functools.partial(affinity, kernels="sm90", gradients=True),
    "pool": pool,
    "tf32": tf32,
}


def main(library: str, cases: str) -> None:
    torch.ops.load_library(library)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what it allocates with NaN
    mutation = ctypes.c_int.in_dll(ctypes.CDLL(library), "ercn_mutation")
    for number, check in json.loads(cases):
        mutation.value = number
        sentence = None
        for seed in range(SEEDS):
            torch.ops.ercn_emulated.set_seed(seed)
            try:
                sentence = CHECKS[check](torch.ops.ercn_emulated)
            except RuntimeError as error:  # the emulator's message where the device's behaviour is undefined
                sentence = str(error).splitlines()[0]
            if sentence is not None:
                break
        print(json.dumps([number, sentence]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
