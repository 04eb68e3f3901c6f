"""The compiled extension: what it says of itself, its ABI, and its ReLU affinity against plain torch."""

import shutil
import subprocess

import pytest
import torch

from ercn.ops import _extension

reason = _extension.load()
built = pytest.mark.skipif(reason is not None, reason=str(reason))

# Panels are 64 columns and register tiles 4 rows: one off either, primes, and degenerate sizes.
SHAPES = [
    pytest.param(*shape, id="x".join(map(str, shape)))
    for shape in [
        (1, 1, 1, 1),
        (2, 3, 5, 63),
        (1, 4, 8, 64),
        (3, 5, 7, 65),
        (1, 21, 17, 131),
        (2, 2, 64, 257),
        (0, 2, 3, 5),
        (2, 0, 3, 5),
        (2, 3, 0, 5),
        (2, 3, 4, 0),
    ]
]


def torch_affinity(value, feat):
    return value @ torch.relu(feat.transpose(1, 2) @ feat)


def torch_gradients(grad_out, value, feat):
    value, feat = value.clone().requires_grad_(), feat.clone().requires_grad_()
    return torch.autograd.grad(torch_affinity(value, feat), (value, feat), grad_out)


def inputs(B, C, D, N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B + C + D + N)
    draw = [torch.randn(B, size, N, generator=generator, dtype=dtype) for size in (C, C, D)]
    return draw[0], draw[1], draw[2]


@pytest.fixture
def one_and_two_threads():
    before = torch.get_num_threads()
    yield (1, 2)
    torch.set_num_threads(before)


@built
def test_build_info():
    from ercn import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "cpp_standard", "flags", "build_type", "torch_target_version", "pybind11"}
    assert info["torch_target_version"] == "2.10"
    assert "-O3" in info["flags"]
    assert info["cpp_standard"] >= 201703


@built
def test_cpu_features_agree_with_the_kernel():
    from ercn import _C

    features = _C.cpu_features()
    assert features and all(type(value) is bool for value in features.values())
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split(":")[1].split() for line in file if line.startswith("flags")), None)
    except FileNotFoundError:
        flags = None
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo to compare with")
    assert {name for name, present in features.items() if present} == set(features) & set(flags)


@built
def test_only_the_stable_abi_is_used():
    from ercn import _C

    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    symbols = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert "torch_parallel_for" in symbols
    assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line]


@built
@pytest.mark.parametrize("B, C, D, N", SHAPES)
def test_forward_and_gradients_equal_torch_in_float64(B, C, D, N):
    value, grad_out, feat = inputs(B, C, D, N)
    native = torch.ops.ercn_native
    torch.testing.assert_close(native.relu_affinity_cpu(value, feat), torch_affinity(value, feat))
    expected = torch_gradients(grad_out, value, feat)
    torch.testing.assert_close(native.relu_affinity_backward_cpu(grad_out, value, feat, True), expected)


@built
@pytest.mark.parametrize("B, C, D, N", SHAPES[:6])
def test_float32_error_is_within_twice_torchs(B, C, D, N):
    value, grad_out, feat = inputs(B, C, D, N, torch.float32)
    # Integer features: T is exact in both precisions, so the ReLU kink is at the same pairs.
    feat = (2 * feat).round()
    native = torch.ops.ercn_native
    ours = [native.relu_affinity_cpu(value, feat)]
    ours += native.relu_affinity_backward_cpu(grad_out, value, feat, True)
    torchs = [torch_affinity(value, feat), *torch_gradients(grad_out, value, feat)]
    value, grad_out, feat = value.double(), grad_out.double(), feat.double()
    exact = [torch_affinity(value, feat), *torch_gradients(grad_out, value, feat)]
    for our, their, true in zip(ours, torchs, exact):
        rounding = torch.finfo(torch.float32).eps * true.abs().max()
        assert (our - true).abs().max() <= 2 * (their - true).abs().max() + rounding


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_thread_count_and_every_run(dtype, one_and_two_threads):
    value, grad_out, feat = inputs(2, 5, 19, 1000, dtype)
    native = torch.ops.ercn_native
    runs = []
    for threads in one_and_two_threads * 2:
        torch.set_num_threads(threads)
        backward = native.relu_affinity_backward_cpu(grad_out, value, feat, True)
        runs.append((native.relu_affinity_cpu(value, feat), *backward))
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run))


@built
def test_any_strides():
    value, grad_out, feat = inputs(2, 6, 10, 77)
    native = torch.ops.ercn_native
    expected = native.relu_affinity_backward_cpu(grad_out, value, feat, True)

    def channels_last(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def with_offset(x):
        return torch.cat((x, x), dim=2)[:, :, x.shape[2] :]

    for layout in (channels_last, with_offset):
        strided = [layout(x) for x in (grad_out, value, feat)]
        assert not any(x.is_contiguous() for x in strided)
        for ours, same in zip(native.relu_affinity_backward_cpu(*strided, True), expected):
            assert torch.equal(ours, same)
    expanded = native.relu_affinity_cpu(value[:, :1].expand_as(value), feat)
    assert torch.equal(expanded, native.relu_affinity_cpu(value[:, :1], feat).expand_as(value))


@built
def test_the_gradient_of_value_is_left_out_unless_asked_for():
    value, grad_out, feat = inputs(2, 3, 9, 70)
    backward = torch.ops.ercn_native.relu_affinity_backward_cpu
    nothing, grad_feat = backward(grad_out, value, feat, False)
    assert nothing.shape == (0,)
    assert torch.equal(grad_feat, backward(grad_out, value, feat, True)[1])


@built
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["value", "feat", "grad_out"])
def test_nan_and_infinity_propagate_as_in_torch(bad, where):
    value, grad_out, feat = inputs(1, 2, 3, 67)
    {"value": value, "feat": feat, "grad_out": grad_out}[where][0, 1, 66] = bad
    native = torch.ops.ercn_native
    ours = [native.relu_affinity_cpu(value, feat)]
    ours += native.relu_affinity_backward_cpu(grad_out, value, feat, True)
    # Autograd adds F·(VᵀG) and F·(GᵀV) after the products, where opposite infinities meet; the op defines F·W.
    affinity = feat.transpose(1, 2) @ feat
    outer = value.transpose(1, 2) @ grad_out
    weight = torch.ops.aten.threshold_backward(outer + outer.transpose(1, 2), affinity, 0)
    affinity = torch.relu(affinity)
    for our, their in zip(ours, [value @ affinity, grad_out @ affinity, feat @ weight]):
        torch.testing.assert_close(our, their, equal_nan=True)


@built
@pytest.mark.parametrize(
    "value, feat, words",
    [
        (torch.ones(2, 3), torch.ones(1, 2, 3), "value must be"),
        (torch.ones(1, 1, 4), torch.ones(1, 2, 3), "value must be"),
        (torch.ones(1, 1, 3), torch.ones(2, 3), "feat must be"),
        (torch.ones(1, 1, 3, dtype=torch.float64), torch.ones(1, 2, 3), "float32"),
        (torch.ones(1, 1, 3, dtype=torch.int64), torch.ones(1, 2, 3, dtype=torch.int64), "float32"),
    ],
)
def test_unsafe_arguments_are_refused(value, feat, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.ercn_native.relu_affinity_cpu(value, feat)


def test_load_is_cached():
    assert _extension.load() is _extension.load()


def test_an_absent_extension_gives_the_recorded_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "find_spec", lambda name: None)
    monkeypatch.setattr(_extension, "RECORD", tmp_path / "_build.json")
    absent = _extension.load.__wrapped__
    assert "not installed" in absent()
    _extension.RECORD.write_text('{"reason": "no C++ compiler: \'c++\' was not found"}')
    assert absent() == "ercn._C was not built: no C++ compiler: 'c++' was not found"


def test_an_extension_that_cannot_load_gives_the_loaders_message(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(_extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    assert _extension.load.__wrapped__() == "ercn._C failed to load: undefined symbol: torch_parallel_for"
