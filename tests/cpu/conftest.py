"""Fixtures of the tests of the CPU kernels: every instruction set of this machine, and several numbers of threads."""

import pytest
import torch

from ercn.ops import _extension

ISAS = _extension.cpu_info()["isas"] if _extension.load() is None else ["portable"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("ERCN_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def thread_counts():
    before = torch.get_num_threads()
    yield (1, 2, 5)
    torch.set_num_threads(before)
