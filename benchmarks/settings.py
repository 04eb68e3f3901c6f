"""Our compiled backends under other settings, beside their own: ``ercn-cpu@NAME`` in results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ercn.benchmarks.cases import Case, Inputs

Runner = Callable[[], tuple[Tensor, ...]]
Make = Callable[[Case, Inputs], Runner]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable that is read at every call."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 products for the dtype "tf32", float32 ones for every other."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ISA = "ERCN_CPU_ISA"
_instructions = partial(variable, ISA)
_kernels = partial(variable, "ERCN_CUDA_KERNELS")


def _within(scope: Callable[[], contextlib.AbstractContextManager], make: Make) -> Make:
    def scoped(case: Case, inputs: Inputs) -> Runner:
        with scope():
            run = make(case, inputs)

        def call() -> tuple[Tensor, ...]:
            with scope():
                return run()

        return call

    return scoped


def _in_float32(make: Make) -> Make:
    def wide(case: Case, inputs: Inputs) -> Runner:
        tensors = tuple(x.float() if x.is_floating_point() else x for x in inputs.tensors)
        return make(replace(case, dtype="float32"), Inputs(tensors, inputs.upstream.float()))

    return wide


# Each wraps the function that makes the timed call; entering and leaving a scope takes about a microsecond.
SETTINGS: dict[str, Callable[[Make], Make]] = {
    "one_thread": partial(_within, _one_thread),
    "portable": partial(_within, partial(_instructions, "portable")),
    "avx2": partial(_within, partial(_instructions, "avx2")),
    "avx512": partial(_within, partial(_instructions, "avx512")),
    "float32": _in_float32,
}
CUDA_SETTINGS: dict[str, Callable[[Make], Make]] = {
    "generic": partial(_within, partial(_kernels, "generic")),
    "sm90_dense": partial(_within, partial(_kernels, "sm90_dense")),
}
