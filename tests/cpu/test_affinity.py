"""The affinity kernels in csrc/cpu for every instruction set of this machine."""

import os
import subprocess
import sys

import pytest
import torch
from _affinity import dense_affinity, least_lucky
from _ops import assert_within_budget, error, layouts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ercn.ops import _extension, cpu, relu_affinity

if (reason := _extension.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")

# Blocks have 96 pixels, panels and strips 4 to 48 columns, and channels are padded to 8: one off each, primes,
# degenerate sizes, odd and even numbers of blocks and of pixels.
SHAPES = [
    pytest.param(*shape, id="x".join(map(str, shape)))
    for shape in [
        (1, 1, 1, 1),
        (2, 3, 5, 95),
        (1, 4, 8, 96),
        (3, 5, 7, 97),
        (1, 21, 17, 131),
        (1, 6, 47, 191),
        (1, 8, 48, 193),
        (2, 9, 49, 33),
        (1, 25, 96, 289),
        (1, 64, 2, 385),
        (0, 2, 3, 5),
        (2, 0, 3, 5),
        (2, 3, 0, 5),
        (2, 3, 4, 0),
    ]
]


def native(value, feat):
    """The C++ kernel alone: the redispatch skips what Python registers."""
    return torch.ops.ercn.relu_affinity.default.redispatch(cpu.KEY, value, feat, "cpu")


def native_backward(grad_out, value, feat, need_value):
    backward = torch.ops.ercn.relu_affinity_backward.default
    return backward.redispatch(cpu.KEY, grad_out, value, feat, need_value, "cpu")


def inputs(B, C, D, N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B + C + D + N)
    draw = [torch.randn(B, size, N, generator=generator, dtype=dtype) for size in (C, C, D)]
    return draw[0], draw[1], draw[2]


@pytest.mark.parametrize("B, C, D, N", SHAPES)
def test_forward_and_gradients_equal_torch_in_float64(B, C, D, N):
    value, grad_out, feat = inputs(B, C, D, N)
    expected, *gradients = dense_affinity(value, feat, grad_out)
    torch.testing.assert_close(native(value, feat), expected)
    torch.testing.assert_close(native_backward(grad_out, value, feat, True), tuple(gradients))


@pytest.mark.parametrize("B, C, D, N", SHAPES[:6])
def test_float32_error_is_within_budget(B, C, D, N):
    value, grad_out, feat = inputs(B, C, D, N, torch.float32)
    # Integer features: T is exact in both precisions, so the ReLU kink is at the same pairs.
    feat = (2 * feat).round()
    ours = [native(value, feat)]
    ours += native_backward(grad_out, value, feat, True)
    exact = dense_affinity(value.double(), feat.double(), grad_out.double())
    for our, their, true in zip(ours, least_lucky(value, feat, grad_out, exact), exact):
        assert_within_budget(our, their, true, channels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B, N", [(2, 1000), (1, 300)])  # 11 blocks; 4, and with five threads fewer pairs than threads
def test_same_bits_for_any_thread_count_and_every_run(B, N, dtype, thread_counts):
    value, grad_out, feat = inputs(B, 5, 19, N, dtype)
    runs = []
    for threads in thread_counts * 2:
        torch.set_num_threads(threads)
        backward = native_backward(grad_out, value, feat, True)
        runs.append((native(value, feat), *backward))
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run))


FEWER_THREADS_THAN_ASKED_FOR = """
import torch
from ercn.ops import _extension
assert _extension.load() is None
torch.set_num_threads(4)
values = torch.arange(24 * 500).reshape(2, 12, 500).remainder(7) - 3.0
print(torch.ops.ercn.relu_affinity(values[:, :3], values[:, 3:]).sum().item())
"""


def test_one_thread_does_the_work_of_several_workers(isa):
    """OpenMP may start fewer threads than it was asked for: these run all tasks."""
    command = [sys.executable, "-c", FEWER_THREADS_THAN_ASKED_FOR]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    values = torch.arange(24 * 500).reshape(2, 12, 500).remainder(7) - 3.0  # exact in float32
    assert float(run.stdout) == (values[:, :3] @ torch.relu(values[:, 3:].mT @ values[:, 3:])).sum().item()


def test_any_strides():
    value, grad_out, feat = inputs(2, 6, 10, 77)
    expected = native_backward(grad_out, value, feat, True)

    def channels_last(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def with_offset(x):
        return torch.cat((x, x), dim=2)[:, :, x.shape[2] :]

    for layout in (channels_last, with_offset):
        strided = [layout(x) for x in (grad_out, value, feat)]
        assert not any(x.is_contiguous() for x in strided)
        for ours, same in zip(native_backward(*strided, True), expected):
            assert torch.equal(ours, same)
    expanded = native(value[:, :1].expand_as(value), feat)
    assert torch.equal(expanded, native(value[:, :1], feat).expand_as(value))


def test_the_gradient_of_value_is_left_out_unless_asked_for():
    value, grad_out, feat = inputs(2, 3, 9, 70)
    nothing, grad_feat = native_backward(grad_out, value, feat, False)
    assert nothing.shape == (0,)
    assert torch.equal(grad_feat, native_backward(grad_out, value, feat, True)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["value", "feat", "grad_out"])
def test_nan_and_infinity_propagate_as_in_torch(bad, where):
    value, grad_out, feat = inputs(1, 2, 3, 67)
    {"value": value, "feat": feat, "grad_out": grad_out}[where][0, 1, 66] = bad
    ours = [native(value, feat)]
    ours += native_backward(grad_out, value, feat, True)
    # Autograd adds F·(VᵀG) and F·(GᵀV) after the products, where opposite infinities meet; the op defines F·W.
    affinity = feat.transpose(1, 2) @ feat
    outer = value.transpose(1, 2) @ grad_out
    weight = torch.ops.aten.threshold_backward(outer + outer.transpose(1, 2), affinity, 0)
    affinity = torch.relu(affinity)
    for our, their in zip(ours, [value @ affinity, grad_out @ affinity, feat @ weight]):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize(
    "value, feat, words",
    [
        (torch.ones(2, 3), torch.ones(1, 2, 3), "value must be"),
        (torch.ones(1, 1, 4), torch.ones(1, 2, 3), "value must be"),
        (torch.ones(1, 1, 3), torch.ones(2, 3), "feat must be"),
        (torch.ones(1, 1, 3, dtype=torch.int64), torch.ones(1, 2, 3), "floating point"),
        (torch.ones(1, 1, 3), torch.ones(1, 2, 3, dtype=torch.int64), "floating point"),
    ],
)
def test_unsafe_arguments_are_refused(value, feat, words):
    with pytest.raises(RuntimeError, match=words):
        native(value, feat)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_layout_and_dtype(data):
    """Compares with float64 on the same rounded data; integer features keep T exact, so no pair crosses ReLU's kink."""
    B, C, D = (data.draw(st.integers(1, limit)) for limit in (3, 64, 70))
    N = data.draw(st.one_of(st.integers(1, 40), st.integers(90, 100), st.integers(186, 200)))
    feat_dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    value, grad_out, feat = inputs(B, C, D, N)
    value, grad_out = value.float(), grad_out.float()
    feat = (2 * feat).round().to(feat_dtype)
    exact = dense_affinity(value.double(), feat.double(), grad_out.double())
    wide = feat if feat_dtype == torch.float64 else feat.float()
    plain = least_lucky(value.to(wide.dtype), wide, grad_out.to(wide.dtype), exact)
    layout = st.sampled_from(["contiguous", "channels_last", "strided", "offset"])
    value, feat = (layouts(x)[data.draw(layout)] for x in (value, feat))
    value, feat = value.requires_grad_(), feat.requires_grad_()
    out = relu_affinity(value, feat, backend="cpu")
    grads = torch.autograd.grad(out, (value, feat), grad_out.to(out.dtype))
    for ours, theirs, true in zip((out, *grads), plain, exact):
        assert_within_budget(ours, theirs, true, channels=True)


def test_bfloat16_products_are_exact_in_float32(isa):
    """The dot-product instructions add products of bfloat16 in float32, as widening does."""
    value, grad_out, feat = inputs(1, 3, 66, 250, torch.float32)
    feat = feat.bfloat16()
    exact = dense_affinity(value.double(), feat.double(), grad_out.double())[0]
    assert error(relu_affinity(value, feat, backend="cpu"), exact) < 2e-6


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("ERCN_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="'sse9'; there are portable, avx2"):
        relu_affinity(torch.ones(1, 1, 2), torch.ones(1, 1, 2), backend="cpu")


@pytest.mark.parametrize("value_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feat_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_pair_of_dtypes(value_dtype, feat_dtype):
    """Sums are float64 where an input is, else float32; gradients come back in each input's dtype."""
    value, grad_out, feat = inputs(1, 3, 5, 40)
    value, feat = value.to(value_dtype), (2 * feat).round().to(feat_dtype)
    sums = torch.float64 if torch.float64 in (value_dtype, feat_dtype) else torch.float32
    out, gradients = native(value, feat), native_backward(grad_out, value, feat, True)
    assert [x.dtype for x in (out, *gradients)] == [sums, value_dtype, feat_dtype]
    exact = dense_affinity(value.double(), feat.double(), grad_out)
    for ours, true in zip((out, *gradients), exact):
        assert error(ours, true) <= torch.finfo(ours.dtype).eps + 8 * torch.finfo(sums).eps
