"""The table of backends: choice, override and error sentences."""

from __future__ import annotations

import contextlib
import doctest
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ercn.ops
from ercn.ops import (
    _backends,
    _library,
    affinity,
    affinity_propagate,
    attention_pool,
    backends,
    cpu,
    gated_attention_pool,
    relu_affinity,
    use_backend,
)


def test_the_cpu_backend_has_every_op():
    assert all(cpu.can_run(op._opname) is None and callable(getattr(cpu, op._opname)) for op in _library.DEFINED)
    assert cpu.can_run("another") == "it has no kernel for another"


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
    """A launcher that counts its calls and runs the reference."""

    def __init__(self, reason=None):
        self.calls, self.reason = [], reason

    def unavailable(self):
        return None

    def can_run(self, op, *args):
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


def pool(h, weight):
    """[B, N, D], [D, D] -> [B, 1, D]."""
    return gated_attention_pool(h, weight, None, weight, None, weight[:1], None)[0]


CALLS = {  # function, inputs for n pixels or instances, ops of a forward
    "relu_affinity": (relu_affinity, lambda n: (torch.ones(1, 1, n), torch.ones(1, 2, n)), ["relu_affinity"]),
    "affinity_propagate": (
        lambda cam, feat: affinity_propagate(cam, feat, steps=2),
        lambda n: (torch.ones(1, 1, n), torch.ones(1, 2, n)),
        ["relu_affinity"] * 2,
    ),
    "gated_attention_pool": (pool, lambda n: (torch.ones(1, n, 3), torch.ones(3, 3)), ["gated_attention_pool"]),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def in_a_thread(function):
    """Run and join it on another thread, as autograd runs the backward of GPU ops."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


@calls
@pytest.mark.parametrize("run", [lambda f: f(), in_a_thread], ids=["this thread", "another thread"])
@pytest.mark.parametrize("around", ["", "first"], ids=["outside of the block", "in another block"])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_backward_stays_on_the_backend_of_the_forward(recorders, call, run, around, mode):
    function, inputs, ops = call
    if mode == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend("second"):
        out = function(*leaves(*inputs(4)))
    with use_backend(around) if around else contextlib.nullcontext():
        run(out.sum().backward)
    assert recorders["second"].calls == ops + [f"{op}_backward" for op in ops]
    assert recorders["first"].calls == []


@calls
def test_a_compiled_graph_follows_the_override(recorders, call):
    function, inputs, ops = call
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        compiled(*inputs(n))
    with use_backend("second"):
        for n in (4, 7):
            out = compiled(*leaves(*inputs(n)))
    compiled(*inputs(5))
    out.sum().backward()
    assert recorders["first"].calls == ops * 3
    assert recorders["second"].calls == ops * 2 + [f"{op}_backward" for op in ops]


def test_the_block_within_a_compiled_function(recorders):
    def function(value, feat):
        with use_backend("second"):
            inner = relu_affinity(value, feat)
        return relu_affinity(inner, feat)

    torch.compiler.reset()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves(*CALLS["relu_affinity"][1](4)))
    out.sum().backward()
    both = ["relu_affinity", "relu_affinity_backward"]
    assert recorders["first"].calls == both and recorders["second"].calls == both


@calls
def test_an_exported_program_keeps_its_backend(recorders, call):
    function, inputs, ops = call

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    with use_backend("second"):
        program = torch.export.export(Module(), inputs(4))
    recorders["second"].calls.clear()
    program.module()(*inputs(4))
    assert recorders["second"].calls == ops and recorders["first"].calls == []


@calls
def test_the_override_reaches_vmap(recorders, call):
    function, inputs, ops = call
    stacked = leaves(*(torch.stack([x, x]) for x in inputs(4)))
    with use_backend("second"):
        out = torch.vmap(function)(*stacked)
    out.sum().backward()
    assert {*recorders["second"].calls} == {*ops, *(f"{op}_backward" for op in ops)} and not recorders["first"].calls


def test_the_override_holds_for_every_thread(recorders):
    x = torch.ones(1, 1, 2)
    with use_backend("second"):
        in_a_thread(lambda: relu_affinity(x, x))
    assert recorders["second"].calls == ["relu_affinity"] and recorders["first"].calls == []


def test_an_error_in_the_block_ends_the_override(recorders):
    x = torch.ones(1, 1, 2)
    with pytest.raises(ZeroDivisionError), use_backend("second"):
        raise ZeroDivisionError
    relu_affinity(x, x)
    assert recorders["first"].calls == ["relu_affinity"]


@pytest.mark.skipif("cpu" not in [row.name for row in backends() if row.reason is None], reason="libercn is not built")
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_compiled_backward_runs_on_the_named_backend(monkeypatch, name):
    """The real table, with the calls of each launcher counted."""
    counts = {row.name: [] for row in _backends.TABLE}

    def counted(row, op):
        launcher = getattr(row.launcher, op)
        monkeypatch.setattr(row.launcher, op, lambda *args: counts[row.name].append(op) or launcher(*args))

    for row in _backends.TABLE:
        for op in ("relu_affinity", "relu_affinity_backward"):
            counted(row, op)
    torch.compiler.reset()
    value, feat = leaves(torch.rand(1, 3, 33), torch.randn(1, 5, 33))
    with use_backend(name):
        out = torch.compile(relu_affinity, fullgraph=True, dynamic=True, backend="aot_eager")(value, feat)
    in_a_thread(out.sum().backward)
    assert counts.pop(name) == ["relu_affinity", "relu_affinity_backward"]
    assert not any(counts.values())


@pytest.mark.parametrize("module", [affinity, attention_pool, _backends], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
