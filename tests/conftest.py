"""Fixtures of all tests: uninitialised memory is filled, so that an unwritten output fails; settings are restored.

Files with slow tests run first: one process runs all of a file, and a long file that starts last delays the end.
"""

import os
import sys
import time

import pytest
import torch
from _coverage import GpuCoverage
from _uninitialised import ALLOCATORS, OPERATORS, from_cpp, from_python

from ercn.benchmarks.settings import precision
from ercn.ops import triton


def pytest_addoption(parser):
    parser.addoption("--gpu-coverage", action="store_true", help="fail where a kernel of this GPU was never launched")
    parser.addoption("--until", type=float, default=float("inf"), help="stop when time.monotonic() is past it")


def pytest_configure(config):
    if config.getoption("--gpu-coverage"):
        config.pluginmanager.register(GpuCoverage(), "gpu-coverage")


def pytest_runtest_teardown(item):
    if time.monotonic() > item.config.getoption("--until"):
        item.session.shouldstop = "out of time"  # each worker of xdist stops itself and so reports its launches


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_is_nan():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, from_python(getattr(owner, name)))
        for owner, name in OPERATORS:
            patch.setattr(owner, name, from_cpp(getattr(owner, name)))
        yield


def process_state() -> dict[str, object]:
    """Settings of the process that a test may change and later tests depend on."""
    state = {
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("ERCN_", "OMP_"))},
        "threads": torch.get_num_threads(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "folder": os.getcwd(),
    }
    if configs := sys.modules.get("ercn.kernels.configs"):
        state["tile table"] = repr(configs.TABLE)
    return state


@pytest.fixture(autouse=True)
def process_is_left_as_it_was():
    before = process_state()
    yield
    after = process_state()
    assert {name: after[name] for name in before} == before


@pytest.fixture
def tf32():
    """Allow TF32 in float32 products."""
    with precision("tf32"):
        yield


@pytest.fixture
def finite_products(monkeypatch):
    """Triton interpreted: all factors of products must be finite, so that a read outside of the inputs fails."""
    if not triton.INTERPRETED:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def checked(self, a, b, *args):
        assert np.isfinite(a.data).all() and np.isfinite(b.data).all(), "a product met memory outside of the inputs"
        return multiply(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", checked)
