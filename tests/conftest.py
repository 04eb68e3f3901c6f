"""Memory that ercn allocates without initialising holds NaN in every test, so that an output left unwritten fails.

Files with slow tests begin first: a file goes to one process as a whole, and a long one that began last would run
alone.
"""

import functools
import sys

import pytest
import torch

from ercn.ops import triton

ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]


def fill_with_nan(allocate):
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


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_is_nan():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, fill_with_nan(getattr(owner, name)))
        yield


@pytest.fixture
def finite_products(monkeypatch):
    """Triton interpreted: no product may meet a value that is not finite, so a read outside of the inputs shows."""
    if not triton.INTERPRETED:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def checked(self, a, b, *args):
        assert np.isfinite(a.data).all() and np.isfinite(b.data).all(), "a product met memory outside of the inputs"
        return multiply(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", checked)
