"""The backend table: choice, override, and the sentences it answers with."""

from __future__ import annotations

import doctest

import pytest
import torch

import ercn.ops
from ercn.ops import _backends, affinity, attention_pool, backends, relu_affinity, use_backend


def test_table_lists_reasons_and_ends_in_the_reference():
    rows = backends()
    assert rows[-1] == ercn.ops.BackendStatus("reference", "any", True, None)
    assert all(row.reason is None or isinstance(row.reason, str) for row in rows)


def test_unknown_names_list_the_choices(monkeypatch):
    x = torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="backend is 'fast'; backends are .*reference"):
        relu_affinity(x, x, backend="fast")
    for name in ("fast", ""):
        with pytest.raises(ValueError, match=f"use_backend's name is '{name}'"), use_backend(name):
            pass
    monkeypatch.setenv("ERCN_BACKEND", "fast")
    with pytest.raises(ValueError, match="ERCN_BACKEND is 'fast'"):
        relu_affinity(x, x)


class Recorder:
    """A launcher that counts its calls and answers through the reference."""

    def __init__(self, reason=None):
        self.calls, self.reason = [], reason

    def unavailable(self):
        return None

    def can_run(self, op, tensors):
        return self.reason

    def __getattr__(self, op):
        def launch(*args):
            self.calls.append(op)
            return getattr(ercn.ops.reference, op)(*args)

        return launch


@pytest.fixture
def recorders(monkeypatch):
    rows = {name: Recorder() for name in ("first", "second")}
    table = tuple(_backends.Backend(name, "cpu", r, automatic=name == "first") for name, r in rows.items())
    monkeypatch.setattr(_backends, "TABLE", table + _backends.TABLE)
    return rows


def test_order_argument_context_and_environment(recorders, monkeypatch):
    x = torch.ones(1, 1, 2)
    relu_affinity(x, x)
    assert recorders["first"].calls == ["relu_affinity"]
    monkeypatch.setenv("ERCN_BACKEND", "second")
    relu_affinity(x, x)
    assert len(recorders["second"].calls) == 1
    with use_backend("first"):
        relu_affinity(x, x)
        assert len(recorders["first"].calls) == 2
        relu_affinity(x, x, backend="second")
    assert len(recorders["second"].calls) == 2
    relu_affinity(x, x)
    assert len(recorders["second"].calls) == 3


def test_an_automatic_backend_that_cannot_run_is_passed_over_and_a_named_one_raises(recorders):
    recorders["first"].reason = "it takes no odd N"
    x = torch.ones(1, 1, 3)
    assert torch.equal(relu_affinity(x, x), torch.full((1, 1, 3), 3.0))
    assert recorders["first"].calls == [] and recorders["second"].calls == []
    with pytest.raises(RuntimeError, match="backend 'first' cannot run relu_affinity: it takes no odd N"):
        relu_affinity(x, x, backend="first")


def test_a_backend_for_another_device_says_so(recorders, monkeypatch):
    row = _backends.Backend("gpu", "cuda", Recorder(), automatic=True)
    monkeypatch.setattr(_backends, "TABLE", (row, *_backends.TABLE))
    x = torch.ones(1, 1, 2)
    with pytest.raises(RuntimeError, match="it runs on cuda, the tensors are on cpu"):
        relu_affinity(x, x, backend="gpu")


def test_backward_stays_on_the_backend_of_the_forward(recorders):
    value, feat = torch.ones(1, 1, 2, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)
    with use_backend("second"):
        out = relu_affinity(value, feat)
    out.sum().backward()
    assert recorders["second"].calls == ["relu_affinity", "relu_affinity_backward"]
    assert recorders["first"].calls == []


def test_a_compiled_graph_follows_the_override(recorders):
    compiled = torch.compile(lambda v, f: relu_affinity(v, f), fullgraph=True)
    x = torch.ones(1, 1, 2)
    compiled(x, x)
    with use_backend("second"):
        compiled(x, x)
    assert recorders["first"].calls == ["relu_affinity"] and recorders["second"].calls == ["relu_affinity"]


@pytest.mark.parametrize("module", [affinity, attention_pool, _backends], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
