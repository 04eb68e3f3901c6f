"""The refinement kernels in csrc/cpu for every instruction set of this machine."""

import pytest
import torch
from _ops import error, randn
from _refinement import drawn, drawn_walk, refined, walked, with_gradient

from ercn.ops import _extension, pixel_adaptive_refinement, random_walk
from ercn.ops.reference import transition

if (reason := _extension.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")

NATIVE = torch.ops.ercn_native
EVERYTHING = 1 << 40  # bytes


# Blocks have 4 to 32 pixels, groups 4 or 8 channels: one off each.
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 3), (2, 7, 3, 5, 31), (1, 8, 1, 3, 32), (1, 17, 2, 9, 33)], ids=str)
@pytest.mark.parametrize("form", ["pamr", "par"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_plain_torch(sizes, form, dtype):
    cam, image, grad = (x.to(dtype) for x in drawn(*sizes))
    options = {"dilations": (1, 2, 11), "steps": 3, "form": form}
    ours = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options, backend="cpu"), cam, grad)
    wide = (x.double() for x in (cam, grad))
    exact = with_gradient(lambda x: refined(x, image.double(), (1, 2, 11), 3, form), *wide)
    assert all(error(a, e) < (1e-13 if dtype == torch.float64 else 1e-5) for a, e in zip(ours, exact))


@pytest.mark.parametrize("form", ["pamr", "par"])
def test_weights_formed_again_at_every_step_are_the_same(form):
    cam, image, _ = (x.float() for x in drawn(2, 3, 2, 13, 45))
    arguments = cam, image, [1, 2, 4], 5, form
    kept, made = (NATIVE.pixel_adaptive_refinement_cpu(*arguments, bytes) for bytes in (EVERYTHING, 0))
    assert torch.equal(kept, made) and not torch.equal(kept, cam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_thread_count_and_every_run(dtype, thread_counts):
    cam, image, grad = (x.to(dtype) for x in drawn(1, 9, 3, 67, 71))
    pairs = transition(randn(1, 4, 67, 71, seed=4, dtype=dtype).sigmoid(), 2, 8.0, False)
    runs = []
    for threads in thread_counts * 2:
        torch.set_num_threads(threads)
        settings = [1, 2, 24], 3, "pamr"
        run = [NATIVE.pixel_adaptive_refinement_cpu(cam, image, *settings, kept) for kept in (0, EVERYTHING)]
        run.append(NATIVE.pixel_adaptive_refinement_backward_cpu(grad, image, *settings))
        runs.append([*run, NATIVE.random_walk_cpu(cam, pairs, 2, 5)])
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 2, 3), (2, 7, 5, 31), (1, 17, 3, 33)], ids=str)
def test_walk_equals_plain_torch(sizes, dtype):
    value, affinity, grad = (x.to(dtype) for x in drawn_walk(*sizes, 5))
    ours = with_gradient(lambda x: random_walk(x, affinity, steps=4, backend="cpu"), value, grad)
    exact = with_gradient(lambda x: walked(x, affinity.double(), 5, 8, 4), value.double(), grad.double())
    assert all(error(a, e) < (1e-13 if dtype == torch.float64 else 1e-6) for a, e in zip(ours, exact))


def test_walks_with_weights_of_another_radius_are_refused():
    with pytest.raises(RuntimeError, match="9, H, W] for radius 2"):
        NATIVE.random_walk_cpu(torch.ones(1, 1, 3, 3), torch.ones(1, 69, 3, 3), 2, 1)
    with pytest.raises(RuntimeError, match="radius must"):
        NATIVE.random_walk_cpu(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), 0, 1)


def test_exponents_far_below_zero_give_no_weight_and_no_nan(isa):
    """An outlier among many equal pixels has exponents of -1e9 and less."""
    image = torch.full((1, 1, 9, 9), 0.5)
    image[..., 4, 4] = 0.5 + 2**-20
    cam = randn(1, 1, 9, 9, dtype=torch.float32)
    for form in ("pamr", "par"):
        out = pixel_adaptive_refinement(cam, image, dilations=[1] * 40, steps=1, form=form, backend="cpu")
        exact = refined(cam.double(), image.double(), [1] * 40, 1, form)
        assert error(out, exact) < 1e-5


@pytest.mark.parametrize(
    "cam, image, options, words",
    [
        (torch.ones(1, 3, 4), torch.ones(1, 1, 3, 4), {}, "4 dimensions"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 4, 3), {}, "same B, H and W"),
        (torch.ones(0, 1, 3, 4), torch.ones(0, 1, 3, 4), {}, "none of them 0"),
        (torch.ones(1, 0, 3, 4), torch.ones(1, 1, 3, 4), {}, "channels"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4).double(), {}, "float32"),
        (torch.ones(1, 1, 3, 4).half(), torch.ones(1, 1, 3, 4).half(), {}, "float32"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), {"dilations": []}, "dilations"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), {"dilations": [-1]}, "dilations"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), {"steps": -1}, "steps"),
    ],
)
def test_unsafe_arguments_are_refused(cam, image, options, words):
    arguments = cam, image, options.get("dilations", [1]), options.get("steps", 1), "pamr"
    with pytest.raises(RuntimeError, match=words):
        NATIVE.pixel_adaptive_refinement_cpu(*arguments, 0)
    with pytest.raises(RuntimeError, match=words):
        NATIVE.pixel_adaptive_refinement_backward_cpu(*arguments)
