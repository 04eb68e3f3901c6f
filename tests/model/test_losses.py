"""Loss terms against numbers from SEAM's training step, cases by hand, and degenerate maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ercn import losses

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "seam_losses.npz"
C, N1, N2 = 5, 50 * 50, 15 * 15  # channels, elements of view 1 and view 2


def seam_terms(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """SEAM's four terms from its maps, by the public functions in SEAM's order of operations."""
    maps = {key: torch.from_numpy(value).to(dtype) for key, value in np.load(GOLDEN).items() if key.startswith("cam")}
    label = torch.from_numpy(np.load(GOLDEN)["label"]).to(dtype)
    present = F.pad(label, (1, 0), value=1.0)[:, :, None, None]

    def view2(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(losses.max_norm(x), scale_factor=0.3, mode="bilinear", align_corners=True) * present

    cam1, refined1 = view2(maps["cam1"]), view2(maps["cam_rv1"])
    cam2, refined2 = (losses.max_norm(maps[key]) * present for key in ("cam2", "cam_rv2"))
    scores = [maps[key][:, 1:].mean((2, 3)) for key in ("cam1", "cam2")]
    refined = [(maps[key] * present)[:, 1:] for key in ("cam_rv1", "cam_rv2")]
    return {
        "loss_cls": sum(losses.classification_loss(score, label) for score in scores) / 2,
        "loss_minpool": sum(map(losses.min_pooling_loss, refined)) / 2,
        "loss_er": losses.equivariance_loss(cam1[:, 1:], cam2[:, 1:]),
        "loss_ecr": losses.equivariant_cross_loss(cam1[:, 1:], refined1, cam2[:, 1:], refined2),
    }


# Relative errors in units of float32's rounding u = 2^-24, to first order. A sum of n terms, however ordered, is off by
# at most (n - 1)u of the sum of their sizes, which for terms of one sign is the sum. Resizing and max_norm take about
# 16 roundings of values below 1. Every term is below 2, so 2·(n + 32)·u bounds the difference of two float32
# evaluations and, all the more, that of float32 from float64.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "term, terms_summed",
    [("loss_cls", N1), ("loss_minpool", N1 // 4), ("loss_er", C * N2), ("loss_ecr", C * N2 // 5)],
)
def test_seam_golden(term, terms_summed, dtype):
    expected = float(np.load(GOLDEN)[term])
    assert abs(seam_terms(dtype)[term].item() - expected) <= 2 * (terms_summed + 32) * 2**-24


def test_max_norm_formula():
    cam = torch.tensor([[[[-1.0, 0.0], [1.0, 3.0]], [[2.0, 3.0], [4.0, 6.0]]]], dtype=torch.float64)
    e = 1e-5
    expected = [
        [[0, 0], [(1 - e) / (3 + e), (3 - e) / (3 + e)]],
        [[0, (1 - e) / (4 + e)], [(2 - e) / (4 + e), (4 - e) / (4 + e)]],
    ]
    torch.testing.assert_close(losses.max_norm(cam), torch.tensor([expected], dtype=torch.float64))


def test_normalize_cam_formula():
    cam = torch.tensor([[[[2.0, 1.0, -1.0]], [[1.0, 4.0, -2.0]]]], dtype=torch.float64)
    e = 1e-5
    a, b = (2 - e) / (2 + e), (4 - e) / (4 + e)
    expected = torch.tensor([[[[1 - a, 1 - b, 1.0]], [[a, 0, 0]], [[0, b, 0]]]], dtype=torch.float64)
    torch.testing.assert_close(losses.normalize_cam(cam), expected)


def test_normalize_cam_keeps_equal_maxima():
    cam = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4)
    c = losses.normalize_cam(cam)
    torch.testing.assert_close(c[:, 1], c[:, 3], rtol=0, atol=0)
    assert (c[:, 0] + c[:, 1] == 1).all()


def test_classification_is_multilabel_soft_margin():
    logits, target = torch.randn(6, 4, dtype=torch.float64), (torch.rand(6, 4) > 0.5).double()
    weight = torch.rand(4, dtype=torch.float64)
    expected = F.multilabel_soft_margin_loss(logits, target, weight=weight)
    torch.testing.assert_close(losses.classification_loss(logits, target, weight=weight), expected)
    by_picture = torch.rand(6, 1, dtype=torch.float64)
    rows = torch.stack([losses.classification_loss(x[None], t[None]) for x, t in zip(logits, target)])
    torch.testing.assert_close(
        losses.classification_loss(logits, target, weight=by_picture), (rows * by_picture[:, 0]).mean()
    )
    one = losses.classification_loss(logits, torch.ones_like(target), pos_weight=torch.full((4,), 3.0).double())
    torch.testing.assert_close(one, 3 * losses.classification_loss(logits, torch.ones_like(target)))


def test_equivariance_counts_valid_elements_only():
    cam1, cam2 = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    valid = torch.zeros(4, 5, dtype=torch.bool)
    valid[1:3, 2:] = True
    inside = losses.equivariance_loss(cam1[..., 1:3, 2:], cam2[..., 1:3, 2:])
    torch.testing.assert_close(losses.equivariance_loss(cam1, cam2, valid=valid), inside)
    outside = torch.where(valid, cam2, torch.tensor(float("nan")))
    torch.testing.assert_close(losses.equivariance_loss(cam1, outside, valid=valid), inside)
    assert losses.equivariance_loss(cam1, cam2, valid=torch.zeros_like(valid)) == 0


def random_maps(classes=3, h=6, w=5):
    cam1, cam2 = torch.rand(2, classes, h, w), torch.rand(2, classes, h, w)
    return cam1, torch.rand(2, 1 + classes, h, w), cam2, torch.rand(2, 1 + classes, h, w)


def ecr_by_loops(cam, refined, fraction):
    """One direction, one picture after the other, in NumPy."""
    result = []
    for c, r in zip(cam.numpy(), refined.numpy()):
        kept = np.where(c == c.max(0), c, 0)
        difference = np.abs(np.concatenate([1 - c.max(0)[None], kept]) - r).ravel()
        result.append(np.sort(difference)[::-1][: max(1, int(difference.size * fraction))].mean())
    return np.mean(result)


@pytest.mark.parametrize("fraction", [0.2, 1.0, 0.001])
def test_cross_loss_by_loops(fraction):
    cam1, refined1, cam2, refined2 = random_maps()
    expected = ecr_by_loops(cam2, refined1, fraction) + ecr_by_loops(cam1, refined2, fraction)
    loss = losses.equivariant_cross_loss(cam1, refined1, cam2, refined2, fraction=fraction)
    assert loss.item() == pytest.approx(expected, rel=64 * 2**-24)


def test_cross_loss_valid():
    maps = random_maps()
    full = losses.equivariant_cross_loss(*maps)
    torch.testing.assert_close(losses.equivariant_cross_loss(*maps, valid=torch.ones(6, 5, dtype=torch.bool)), full)
    valid = torch.zeros(6, 5, dtype=torch.bool)
    valid[:4, 1:] = True
    inside = losses.equivariant_cross_loss(*(x[..., :4, 1:] for x in maps))
    torch.testing.assert_close(losses.equivariant_cross_loss(*maps, valid=valid), inside)
    assert losses.equivariant_cross_loss(*maps, valid=torch.zeros_like(valid)) == 0
    # each picture takes the share of its own valid elements
    both = torch.stack([valid, torch.ones_like(valid)])[:, None]
    each = [
        losses.equivariant_cross_loss(*(x[i : i + 1] for x in maps), valid=both[i]) for i in range(2)
    ]
    torch.testing.assert_close(losses.equivariant_cross_loss(*maps, valid=both), sum(each) / 2)


def test_cross_loss_trains_the_refined_maps_only():
    cam1, refined1, cam2, refined2 = (x.requires_grad_() for x in random_maps())
    losses.equivariant_cross_loss(cam1, refined1, cam2, refined2).backward()
    assert cam1.grad is None and cam2.grad is None
    # the hardest fifth of 4·6·5 values a picture, mean over 2 pictures
    for refined in (refined1, refined2):
        values = refined.grad.flatten(1)
        assert ((values != 0).sum(1) == 24).all()
        assert values.abs().sum().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("fraction", [0, -0.2, 1.01])
def test_cross_loss_fraction(fraction):
    with pytest.raises(ValueError, match="fraction must be in"):
        losses.equivariant_cross_loss(*random_maps(), fraction=fraction)


def test_refinement_consistency_by_loops():
    cam, refined, mask = (torch.rand(3, channels, 5, 6).double() for channels in (4, 4, 1))
    mask[1] = 0
    expected = 0.0
    for b in (0, 2):
        total = 0.0
        for i in range(5):
            for j in range(6):
                for c in range(4):
                    total -= (mask[b, 0, i, j] * refined[b, c, i, j] * (cam[b, c, i, j] + 1e-10).log()).item()
        expected += total / mask[b].sum().item() / 3
    assert losses.refinement_consistency(cam, refined, mask).item() == pytest.approx(expected, rel=1e-12)


def test_min_pooling_by_sorting():
    refined = torch.randn(2, 3, 6, 7)
    smallest = np.sort(refined.amax(1).flatten(1).numpy(), 1)[:, : 42 // 4]
    assert losses.min_pooling_loss(refined).item() == pytest.approx(np.maximum(smallest, 0).mean(), rel=64 * 2**-24)
    assert losses.min_pooling_loss(torch.full((1, 2, 1, 1), 0.5)).item() == 0.5


def every_term(cam1, cam2, refined1, refined2, label):
    present = label[:, :, None, None]
    present_all = F.pad(label, (1, 0), value=1.0)[:, :, None, None]
    n1, n2 = losses.max_norm(cam1) * present, losses.max_norm(cam2) * present
    r1, r2 = losses.max_norm(refined1) * present_all, losses.max_norm(refined2) * present_all
    mask = (losses.normalize_cam(cam1)[:, 1:].amax(1, keepdim=True) >= 0.3).to(n1.dtype)
    return {
        "cls": losses.classification_loss(cam1.mean((2, 3)), label),
        "er": losses.equivariance_loss(n1, n2),
        "ecr": losses.equivariant_cross_loss(n1, r1, n2, r2),
        "consistency": losses.refinement_consistency(losses.add_background(n1), r1, mask),
        "min_pool": losses.min_pooling_loss(refined1[:, 1:] * present),
        "normalized": losses.normalize_cam(cam1).sum(),
    }


@pytest.mark.parametrize("h, w", [(1, 1), (4, 6)])
@pytest.mark.parametrize("fill", [0.0, 1.0, -2.0, 1e-5, 1e30])
@pytest.mark.parametrize("labels", [0.0, 1.0])
def test_flat_maps_give_finite_losses_and_gradients(fill, labels, h, w):
    maps = [torch.full((2, c, h, w), fill, requires_grad=True) for c in (3, 3, 4, 4)]
    for name, loss in every_term(*maps, torch.full((2, 3), labels)).items():
        assert torch.isfinite(loss), name
        for grad in torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True):
            assert grad is None or torch.isfinite(grad).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_under_autocast_equal_float32(dtype):
    maps = [torch.randn(2, c, 5, 7).to(dtype) for c in (3, 3, 4, 4)]
    label = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = every_term(*(x.float() for x in maps), label)
    with torch.autocast("cpu", torch.bfloat16):
        actual = every_term(*maps, label)
    expected["cls"] = losses.classification_loss(maps[0].mean((2, 3)), label)  # the caller takes the mean
    expected["min_pool"] = losses.min_pooling_loss(maps[2][:, 1:] * label[:, :, None, None])
    for name in expected:
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    maps = [torch.randn(1, c, 3, 4, dtype=torch.float64, requires_grad=True) for c in (2, 2, 3, 3)]
    label = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for name in ("cls", "er", "consistency", "min_pool", "normalized"):
        assert torch.autograd.gradcheck(lambda *x, name=name: every_term(*x, label)[name], maps), name
    # the cross loss treats the CAM as a constant: only the refined maps
    assert torch.autograd.gradcheck(
        lambda r1, r2: every_term(maps[0].detach(), maps[1].detach(), r1, r2, label)["ecr"], maps[2:]
    )
