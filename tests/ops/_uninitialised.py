"""Fills memory that ercn allocates without initialising: NaN from torch, 3.4e38 from C's malloc."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

import torch

ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
OPERATORS = [(torch._ops.OpOverloadPacket, "__call__"), (torch._ops.OpOverload, "__call__")]
OPERATORS += [(torch._ops.OpOverload, "redispatch")]
M_PERTURB = -6  # of glibc's mallopt


def from_python(allocate):
    """torch's function, with NaN in the tensors that ercn allocates by it."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or not tensor.is_floating_point():
            return tensor
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "ercn":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


def from_cpp(call):
    """A call of an operator. For one of ours, torch and malloc fill what they allocate."""

    @functools.wraps(call)
    def wrapper(self, *args, **kwargs):
        name = self._name if isinstance(self, torch._ops.OpOverload) else self._qualified_op_name
        ours = name.startswith(("ercn::", "ercn_native::"))
        with _filled() if ours else contextlib.nullcontext():
            return call(self, *args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _filled():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: None)
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    mallopt(M_PERTURB, 0x80)  # bytes of 0x7f
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
