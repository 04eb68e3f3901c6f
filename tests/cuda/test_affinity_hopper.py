"""The Hopper affinity kernels, on such a GPU or emulated: every compiled size, edges of tiles, layouts, repeats.

ops/test_gpu_ops.py has the tests of every backend.
"""

from __future__ import annotations

import pytest
import torch
from _affinity import by_formula
from _cuda import HOPPER as DEVICE
from _cuda import marks, operators
from _ops import assert_within_budget, error, finite_parts, layouts, randn

pytestmark = marks(DEVICE)

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops():
    return operators(DEVICE)


def off_kink(batch, dim, n):
    """Features whose products stay away from 0, where rounding alone would flip the ReLU."""
    sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()
    return sign * (2 + 0.2 * randn(batch, dim, n).clamp(-3, 3)) / dim**0.5


def dense(value, feat):
    return value @ torch.relu(feat.mT @ feat)


def gradients(grad, value, feat):
    leaves = value.detach().clone().requires_grad_(), feat.detach().clone().requires_grad_()
    return torch.autograd.grad(dense(*leaves), leaves, grad)


def forward(ops, value, feat, kernels="sm90"):
    return ops.relu_affinity_cuda(value.to(DEVICE), feat.to(DEVICE), False, kernels).cpu()


def backward(ops, grad, value, feat, need_value=True):
    tensors = (x.to(DEVICE) for x in (grad, value, feat))
    return tuple(x.cpu() for x in ops.relu_affinity_backward_cuda(*tensors, need_value, False, "sm90"))


def check(ops, b, c, d, n, dtype, kernels=("sm90", "sm90_dense")):
    value, grad, feat = randn(b, c, n, seed=1), randn(b, c, n, seed=2), off_kink(b, d, n).to(dtype).double()
    exact, plain = dense(value, feat), dense(value.to(dtype), feat.to(dtype))
    for name in kernels:
        out = forward(ops, value.float(), feat.to(dtype), name)
        assert out.dtype == torch.float32 and out.is_contiguous()
        assert_within_budget(out, plain, exact, channels=True)
    ours = backward(ops, grad.float(), value.float(), feat.to(dtype))
    exact, plain = gradients(grad, value, feat), gradients(grad.to(dtype), value.to(dtype), feat.to(dtype))
    for mine, torchs, truth in zip(ours, plain, exact):
        assert_within_budget(mine, torchs, truth, channels=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [7, 22, 30])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_every_compiled_size(ops, dim, channels, dtype):
    check(ops, 1, channels, dim, 300, dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 63, 65, 127, 128, 129, 255, 256, 257, 383, 385])
def test_edges_of_every_tile(ops, n):
    check(ops, 2, 3, 64, n, torch.bfloat16)
    check(ops, 1, 3, 256, n, torch.float16)


@pytest.mark.parametrize("channels", [8, 9, 24, 25, 32, 33, 70])
def test_edges_of_channel_blocks(ops, channels):
    check(ops, 1, channels, 64, 130, torch.bfloat16, ["sm90"])
    check(ops, 1, channels, 64, 130, torch.float16, ["sm90"])


def test_images_share_nothing(ops):
    value, grad, feat = randn(3, 4, 300, seed=1).float(), randn(3, 4, 300, seed=2).float(), off_kink(3, 128, 300)
    feat = (feat * torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1)).bfloat16()
    whole = forward(ops, value, feat), *backward(ops, grad, value, feat)
    for i in range(3):
        one = slice(i, i + 1)
        alone = forward(ops, value[one], feat[one]), *backward(ops, grad[one], value[one], feat[one])
        for a, w in zip(alone, whole):  # sums in another order, rounded once
            assert error(a, w[one].double()) <= torch.finfo(a.dtype).eps + 16 * torch.finfo(torch.float32).eps
    feat[1] = float("nan")
    broken = forward(ops, value, feat), *backward(ops, grad, value, feat)
    for a, b in zip(whole, broken):
        assert torch.equal(a[::2], b[::2]) and b[1].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory of a band can be set in the emulator's library alone")
@pytest.mark.parametrize("kilobytes", [0, 180])
def test_bands_of_mirrored_sums(ops, kilobytes):
    """Bands of one row block and of several add up to the same sums."""
    value, feat = randn(1, 22, 1100, seed=1, dtype=torch.float32), randn(1, 64, 1100, seed=2, dtype=torch.bfloat16)
    bands = ops.relu_affinity_bands(value, feat, kilobytes << 10)
    assert error(bands, forward(ops, value, feat).double()) < 16 * torch.finfo(torch.float32).eps
    assert torch.equal(bands, ops.relu_affinity_bands(value, feat, kilobytes << 10))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layouts_read_in_place_or_packed(ops, dtype):
    """Pixel-major features of aligned rows are read in place; the result is the same."""
    value, grad = (randn(2, 5, 150, seed=seed).float().to(DEVICE) for seed in (1, 2))
    feat = randn(2, 64, 150).to(DEVICE, dtype)
    expected = forward(ops, value, feat), *backward(ops, grad, value, feat)
    wide = torch.full((2, 151, 72), float("nan"), dtype=dtype, device=DEVICE)  # rows of 144 bytes, images apart
    wide[:, 1:, 8:] = feat.mT
    views = {"aligned rows": wide[:, 1:, 8:].mT, **layouts(feat)}
    del views["expanded"]
    for view in views.values():
        found = forward(ops, value, view), *backward(ops, grad, value, view)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    for name, v in layouts(value).items():
        if name != "expanded":
            found = forward(ops, v, feat), *backward(ops, layouts(grad)[name], v, feat)
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    one = feat[:1].expand_as(feat)
    assert torch.equal(forward(ops, value, one), forward(ops, value, one.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_values_of_every_dtype(ops, dtype):
    value, grad, feat = randn(1, 5, 140, seed=1).to(dtype), randn(1, 5, 140, seed=2), off_kink(1, 64, 140).bfloat16()
    wide = value.float()
    assert torch.equal(forward(ops, value, feat), forward(ops, wide, feat))
    grad_value, grad_feat = backward(ops, grad.float(), value, feat)
    expected = backward(ops, grad.float(), wide, feat)
    assert grad_value.dtype == dtype and torch.equal(grad_value, expected[0].to(dtype))
    assert torch.equal(grad_feat, expected[1])
    empty, same = backward(ops, grad.float(), value, feat, need_value=False)
    assert empty.numel() == 0 and torch.equal(same, grad_feat)


def test_two_terms_keep_sixteen_bits_of_value(ops):
    """One-hot features make A the identity, so the output is value in its two terms."""
    feat = torch.eye(64).repeat(1, 2)[None, :, :128]
    feat[:, :, 64:] *= 0
    value = randn(1, 3, 128, dtype=torch.float32)
    for dtype, bits in ((torch.bfloat16, 16), (torch.float16, 21)):
        out = forward(ops, value, feat.to(dtype))
        assert error(out[..., :64], value[..., :64].double()) < 2.0**-bits
        assert (out[..., 64:] == 0).all()


def test_long_sums_are_not_truncated(ops):
    """A constant map stays as constant as fp32 sums keep it, though tensor cores truncate.

    In units of 2^-23 of the result, a tile's 8 steps lose (1 + … + 8) / 8 at most, the additions of n / 128 tiles half
    of (1 + … + n / 128) / (n / 128), the additions of terms and parts 2. One sum of all steps would lose 15 somewhere.
    """
    n = 1536
    feat = torch.randint(1, 16, (1, 64, n), generator=torch.Generator().manual_seed(0)) / 16  # T is exact
    value = torch.full((1, 2, n), 0.7)
    a = (feat.double().mT @ feat.double()).bfloat16().double()
    high = value.bfloat16()
    exact = (high.double() + (value - high.float()).bfloat16().double()) @ a
    bound = (4.5 + (n / 128 + 1) / 4 + 2) * 2.0**-23
    feat = feat.bfloat16()
    outs = (forward(ops, value, feat, kernels) for kernels in ("sm90", "sm90_dense"))
    for sums in (*outs, backward(ops, value, value, feat)[0]):
        assert ((sums.double() - exact) / exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_gradients_of_any_scale(ops, scale, dtype):
    """Powers of two bring value and gradient into fp16's range and back; channels may differ by twenty orders."""
    spread = torch.tensor([1.0, 1e-20, 1e10]).double().view(1, 3, 1)
    value, grad = randn(1, 3, 130, seed=1) * spread, randn(1, 3, 130, seed=2) / spread * scale
    feat = off_kink(1, 64, 130).to(dtype)
    grad_value, grad_feat = backward(ops, grad.float(), value.float(), feat.float().to(dtype))
    exact, plain = gradients(grad, value, feat.double()), gradients(grad.bfloat16(), value.bfloat16(), feat.bfloat16())
    for channel in range(3):
        one = slice(channel, channel + 1)
        assert error(grad_value[:, one], exact[0][:, one]) <= 2 * error(plain[0][:, one], exact[0][:, one])
    if dtype == torch.bfloat16:  # fp16 cannot hold the result
        assert error(grad_feat, exact[1]) <= 2 * error(plain[1], exact[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["value", "feat", "grad"])
def test_nan_and_inf_stay_where_torch_has_them(ops, where, bad):
    tensors = {"value": randn(1, 2, 200, seed=1), "feat": off_kink(1, 64, 200), "grad": randn(1, 2, 200, seed=3)}
    tensors[where][0, 1, 7] = bad
    value, feat, grad = tensors["value"].float(), tensors["feat"].bfloat16(), tensors["grad"].float()
    ours = forward(ops, value, feat), *backward(ops, grad, value, feat)
    for a, e in zip(ours, by_formula(grad, value, feat.float())):
        a = a.cpu()
        if where == "feat":  # Inf times a value's high term and its low one is NaN where their signs differ
            a = torch.where(a.isnan() & ~e.isfinite(), e, a)
        finite_parts(a, e)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_runs_are_bit_equal_in_any_order_of_threads(ops, dtype):
    value, grad = randn(2, 22, 300, seed=1).float(), randn(2, 22, 300, seed=2).float()
    feat = randn(2, 64, 300).to(dtype)
    runs = []
    for seed in (1, 2):
        if DEVICE == "cpu":
            ops.set_seed(seed)
        outs = (forward(ops, value, feat, kernels) for kernels in ("sm90", "sm90_dense"))
        runs.append((*outs, *backward(ops, grad, value, feat)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_sentences_of_what_they_do_not_take(ops):
    value = torch.ones(1, 1, 4)
    for feat, words in ((torch.ones(1, 64, 4), "bfloat16 and float16"), (torch.ones(1, 65, 4).half(), "not 65")):
        with pytest.raises(RuntimeError, match=words):
            forward(ops, value, feat)
    assert forward(ops, torch.ones(1, 2, 0), torch.ones(1, 64, 0).half()).shape == (1, 2, 0)
    nothing = torch.ones(1, 0, 4)
    assert (backward(ops, nothing, nothing, torch.ones(1, 64, 4).half())[1] == 0).all()
