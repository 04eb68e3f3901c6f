"""The refinements on every GPU backend that has them, against plain torch in float64: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from _gpu_backends import BACKENDS, DEVICE, here
from _ops import assert_within_budget, backends_of, error, finite_parts, golden
from _refinement import drawn, drawn_walk, refined, walked, with_gradient

from ercn.ops import pixel_adaptive_refinement, random_walk, use_backend

BACKENDS = [name for name in BACKENDS if name in backends_of("pixel_adaptive_refinement", DEVICE)]
if not BACKENDS:
    pytest.skip("no GPU backend with the refinements can be used in this process", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def assert_refined(cam, image, grad, dtype, **options):
    narrow = [here(x.to(dtype)) for x in (cam, grad)]
    picture = here(image.to(dtype))
    ours = with_gradient(lambda x: pixel_adaptive_refinement(x, picture, **options), *narrow)
    settings = options["dilations"], options["steps"], options["form"]
    plain = with_gradient(lambda x: refined(x, image.float(), *settings), cam.float(), grad.float())
    exact = with_gradient(lambda x: refined(x, image, *settings), cam, grad)
    for mine, torchs, truth in zip(ours, plain, exact):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_within_budget(mine.cpu(), torchs, truth)


@pytest.mark.parametrize("form", ["pamr", "par"])
@pytest.mark.parametrize(
    "sizes, dilations, dtype",
    [
        ((1, 1, 1, 1, 1), (1,), torch.float32),
        ((1, 9, 2, 1, 13), (2,), torch.float32),
        ((1, 2, 1, 2, 67), (1, 7), torch.float32),
        ((2, 3, 3, 7, 5), (1, 3), torch.bfloat16),
        ((2, 3, 3, 7, 5), (1, 3), torch.float16),
    ],
    ids=str,
)
def test_forward_and_gradient_within_budget(sizes, dilations, dtype, form):
    cam, image, grad = drawn(*sizes, dtype=dtype)
    image[..., : sizes[4] // 2] = 0.5
    assert_refined(cam, image, grad, dtype, dilations=dilations, steps=2, form=form)


@pytest.mark.parametrize("form", ["pamr", "par"])
def test_matches_published_code(form):
    data = {key.removeprefix("small_"): x for key, x in golden(form).items()}
    options = {"dilations": data["dilations"].tolist(), "steps": int(data["steps"]), "form": form}
    out = pixel_adaptive_refinement(here(data["cam"].float()), here(data["image"].float()), **options)
    assert error(out.cpu(), data["out"]) < 2e-6


def test_strides_and_images_in_several_pieces(monkeypatch):
    from ercn.kernels import refinement

    monkeypatch.setattr(refinement, "WEIGHT_BYTES", 1)
    cam, image, grad = drawn(2, 2, 1, 3, 4)
    cam, image, grad = (x.mT.contiguous().mT for x in (cam, image, grad))
    assert_refined(cam, image, grad, torch.float32, dilations=(2,), steps=2, form="pamr")
    whole = image.mul(255).to(torch.uint8)
    bytes_, floats = (pixel_adaptive_refinement(here(cam.float()), here(x), steps=1) for x in (whole, whole.float()))
    assert torch.equal(bytes_, floats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["cam", "image", "grad"])
def test_nan_and_infinity_reach_whom_they_concern(what, bad):
    cam, image, grad = (x.abs() + 0.1 for x in drawn(1, 2, 2, 6, 9))
    {"cam": cam, "image": image, "grad": grad}[what][0, 1, 5, 0] = bad
    options = {"dilations": (1, 3), "steps": 1}
    picture = here(image.float())
    ours = with_gradient(
        lambda x: pixel_adaptive_refinement(x, picture, **options), here(cam.float()), here(grad.float())
    )
    for mine, truth in zip(ours, with_gradient(lambda x: refined(x, image, (1, 3), 1), cam, grad)):
        assert error(*finite_parts(mine.cpu(), truth)) < 1e-5


def test_two_runs_are_bit_equal():
    cam, image, grad = (here(x.float()) for x in drawn(1, 3, 2, 5, 7))
    first, second = (
        with_gradient(lambda x: pixel_adaptive_refinement(x, image, dilations=(1, 2), steps=2), cam, grad)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes, radius", [((1, 1, 1, 1), 2), ((2, 9, 7, 5), 3), ((1, 2, 3, 47), 5)], ids=str)
def test_walk_within_budget(sizes, radius, dtype):
    value, affinity, grad = drawn_walk(*sizes, radius, dtype)
    pairs = here(affinity.to(dtype))
    narrow = here(value.to(dtype)).mT.contiguous().mT, here(grad.to(dtype))
    ours = with_gradient(lambda x: random_walk(x, pairs, radius=radius, steps=3), *narrow)
    plain, exact = (
        with_gradient(lambda x: walked(x, affinity.to(x.dtype), radius, 8.0, 3), value.to(kind), grad.to(kind))
        for kind in (torch.float32, torch.float64)
    )
    for mine, torchs, truth in zip(ours, plain, exact):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_within_budget(mine.cpu(), torchs, truth)
    assert torch.equal(random_walk(narrow[0], pairs, radius=radius, steps=0), narrow[0])
