"""The refinements against the published code, plain torch in float64, and properties every backend must have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _ops import assert_within_budget, backends_of, error, finite_parts, golden, randn
from _refinement import drawn, refined, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ercn
from ercn.ops import _backends, pixel_adaptive_refinement

pytestmark = pytest.mark.parametrize("backend", backends_of("pixel_adaptive_refinement"))

FORMS = ["pamr", "par"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# B, C, K, H, W and dilations: ones, primes, one row, one column, more channels than a group, pixel blocks plus or minus
# one, neighbours farther away than the width of the map.
CASES = [
    ((1, 1, 1, 1, 1), (1,)),
    ((2, 3, 3, 7, 5), (1, 2, 4, 8, 12, 24)),
    ((1, 9, 2, 1, 13), (2, 3)),
    ((1, 4, 5, 17, 1), (1, 30)),
    ((1, 21, 3, 11, 33), (1, 5)),
    ((1, 2, 1, 6, 67), (1, 2, 3, 4, 5, 6, 7, 8, 9)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["small", "published"])
def test_matches_published_code(backend, form, case):
    data = {key.removeprefix(case + "_"): x for key, x in golden(form).items() if key.startswith(case)}
    options = {"dilations": data["dilations"].tolist(), "steps": int(data["steps"]), "form": form, "backend": backend}
    cam, image, grad, *truth = (data[name] for name in ("cam", "image", "grad_out", "out", "grad_cam"))
    ours = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)
    assert all(error(a, e) < 1e-13 for a, e in zip(ours, truth))
    cam, image, grad = cam.float(), image.float(), grad.float()
    lower = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)
    plain = with_gradient(lambda x: refined(x, image, options["dilations"], options["steps"], form), cam, grad)
    for mine, torchs, exact in zip(lower, plain, truth):
        assert_within_budget(mine, torchs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes, dilations", CASES, ids=str)
def test_forward_and_gradient_within_budget(backend, sizes, dilations, form, dtype):
    cam, image, grad = drawn(*sizes, dtype=dtype)
    image[..., : sizes[4] // 2] = 0.5  # flat: a standard deviation of 0
    options = {"dilations": dilations, "steps": 3, "form": form, "backend": backend}
    picture = image.to(dtype)
    ours = with_gradient(
        lambda x: pixel_adaptive_refinement(x, picture, **options), cam.to(dtype), grad.to(dtype)
    )
    wide = dtype if dtype == torch.float64 else torch.float32
    plain = with_gradient(lambda x: refined(x, image.to(wide), dilations, 3, form), cam.to(wide), grad.to(wide))
    exact = with_gradient(lambda x: refined(x, image, dilations, 3, form), cam, grad)
    for mine, torchs, truth in zip(ours, plain, exact):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_within_budget(mine, torchs, truth)


def test_any_strides(backend):
    cam, image, grad = drawn(2, 3, 4, 9, 6)
    options = {"dilations": (1, 3), "steps": 2, "backend": backend}
    expected = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)

    def transposed(x):
        return x.mT.contiguous().mT

    def spaced(x):
        room = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"), dtype=x.dtype)
        room[..., 1::2] = x
        return room[..., 1::2]

    for layout in (transposed, spaced, lambda x: x.to(memory_format=torch.channels_last)):
        leaf = layout(cam).requires_grad_()
        out = pixel_adaptive_refinement(leaf, layout(image), **options)
        assert torch.equal(out, expected[0]) and out.is_contiguous()
        assert torch.equal(torch.autograd.grad(out, leaf, layout(grad))[0], expected[1])
    one = pixel_adaptive_refinement(cam[:1].expand_as(cam), image[:1].expand_as(image), **options)
    assert torch.equal(one, expected[0][:1].expand_as(cam))
    leaf = cam.clone().requires_grad_()
    pixel_adaptive_refinement(leaf, image, **options).sum().backward()  # a gradient of stride 0
    ones = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, torch.ones_like(cam))
    assert torch.equal(leaf.grad, ones[1])


def test_no_step_is_a_copy(backend):
    cam, image, _ = drawn(1, 2, 3, 4, 5)
    out = pixel_adaptive_refinement(cam, image, steps=0, backend=backend)
    assert torch.equal(out, cam) and out.data_ptr() != cam.data_ptr()


def test_any_dtype_and_scale_of_the_picture(backend):
    cam = torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    image = torch.randint(0, 256, (1, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = pixel_adaptive_refinement(cam, image, backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, pixel_adaptive_refinement(cam, image.float(), backend=backend))
    scaled = pixel_adaptive_refinement(cam, image / 255 - 0.4, backend=backend)
    torch.testing.assert_close(out, scaled, rtol=1e-4, atol=1e-4)
    mixed = pixel_adaptive_refinement(cam, image.double(), backend=backend)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, pixel_adaptive_refinement(cam.double(), image, backend=backend).float())


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_gradients(backend, form):
    cam, image, grad = drawn(1, 2, 2, 5, 4)

    def refine(x):
        return pixel_adaptive_refinement(x, image, dilations=(1, 3), steps=2, form=form, backend=backend)

    assert torch.autograd.gradcheck(refine, cam.requires_grad_(), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(refine, cam, grad.requires_grad_(), nondet_tol=0.0)


def test_a_picture_that_needs_a_gradient_is_refused(backend):
    cam, image, _ = drawn(1, 2, 3, 4, 5)
    image.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no gradient of image.*pass image.detach\(\)"):
        pixel_adaptive_refinement(cam, image, backend=backend)
    with torch.no_grad():
        assert torch.isfinite(pixel_adaptive_refinement(cam, image, backend=backend)).all()


def test_forward_mode_is_refused(backend):
    cam, image, tangent = drawn(1, 2, 3, 4, 5)
    with pytest.raises(NotImplementedError, match="pixel_adaptive_refinement has no forward-mode derivative"):
        torch.func.jvp(lambda x: pixel_adaptive_refinement(x, image, backend=backend), (cam,), (tangent,))


def test_opcheck(backend):
    cam, image, _ = drawn(2, 3, 2, 5, 4)
    ops = torch.ops.ercn.pixel_adaptive_refinement.default, torch.ops.ercn.pixel_adaptive_refinement_backward.default
    for op in ops:
        for map_ in (cam, cam.clone().requires_grad_(), cam.to(memory_format=torch.channels_last), cam.float()):
            torch.library.opcheck(op, (map_, image, [1, 3], 2, "par", backend))


def test_compile_with_dynamic_sizes_does_not_recompile(backend):
    torch._dynamo.reset()

    def step(cam, image):
        return pixel_adaptive_refinement(2 * cam, image, dilations=(1, 2), steps=2, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for h, w in ((6, 5), (9, 8), (11, 13)):
            cam, image, grad = drawn(2, 3, 3, h, w)
            results = (with_gradient(lambda x, f=f, i=image: f(x, i), cam, grad) for f in (compiled, step))
            assert all(error(ours, eager) < 1e-13 for ours, eager in zip(*results))


def test_export(backend):
    class Module(torch.nn.Module):
        def forward(self, cam, image):
            return pixel_adaptive_refinement(cam, image, steps=2, backend=backend)

    sizes = {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}
    example = drawn(1, 2, 3, 6, 7)[:2]
    program = torch.export.export(Module(), example, dynamic_shapes={"cam": sizes, "image": sizes})
    cam, image, _ = drawn(1, 2, 3, 9, 4)
    assert torch.equal(program.module()(cam, image), pixel_adaptive_refinement(cam, image, steps=2, backend=backend))


def test_vmap(backend):
    cam, image = randn(4, 2, 3, 6, 5, seed=1), randn(4, 2, 3, 6, 5, seed=2)
    grad = randn(4, 2, 3, 6, 5, seed=3)

    def refine(c, i):
        return pixel_adaptive_refinement(c, i, dilations=(1, 2), steps=2, backend=backend)

    def results(function, c):
        leaf = c.clone().requires_grad_()
        out = function(leaf)
        return out, *torch.autograd.grad(out, leaf, grad)

    mapped = results(lambda c: torch.vmap(refine)(c, image), cam)
    looped = results(lambda c: torch.stack([refine(a, i) for a, i in zip(c, image)]), cam)
    assert all(torch.equal(a, b) for a, b in zip(mapped, looped))
    mapped = results(lambda c: torch.vmap(refine, in_dims=(1, None))(c.movedim(0, 1), image[0]), cam)
    looped = results(lambda c: torch.stack([refine(a, image[0]) for a in c]), cam)
    assert all(torch.equal(a, b) for a, b in zip(mapped, looped))
    across = torch.vmap(refine, in_dims=(None, 2))(cam[0], image.movedim(0, 2))
    assert torch.equal(across, torch.stack([refine(cam[0], i) for i in image]))


def test_autocast_changes_nothing(backend):
    cam, image, _ = (x.float() for x in drawn(1, 2, 3, 6, 5))
    plain = pixel_adaptive_refinement(cam, image, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixel_adaptive_refinement(cam, image, backend=backend), plain)


def test_flops(backend):
    cam, image, grad = drawn(2, 3, 4, 6, 5)
    options = {"dilations": (1, 2), "steps": 7, "backend": backend}
    with FlopCounterMode(display=False) as counter:
        with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)
    assert counter.get_total_flops() == 2 * (2 * 7 * 16 * 2 * 3 * 6 * 5)


def test_two_runs_are_bit_equal(backend):
    cam, image, grad = (x.float() for x in drawn(2, 5, 3, 31, 37))
    first, second = (
        with_gradient(lambda x: pixel_adaptive_refinement(x, image, backend=backend), cam, grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (5, 20), (8, 34)], ids=str)
@pytest.mark.parametrize("what", ["cam", "image", "grad"])
def test_nan_and_infinity_reach_whom_they_concern(backend, what, where, bad):
    cam, image, grad = (x.abs() + 0.1 for x in drawn(1, 2, 2, 9, 35))
    {"cam": cam, "image": image, "grad": grad}[what][0, 1][where] = bad
    ours = with_gradient(
        lambda x: pixel_adaptive_refinement(x, image, dilations=(1, 4), steps=1, backend=backend), cam, grad
    )
    exact = with_gradient(lambda x: refined(x, image, (1, 4), 1), cam, grad)
    for mine, truth in zip(ours, exact):
        assert error(*finite_parts(mine, truth)) < 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_neighbours_far_beyond_a_small_map_take_no_memory(backend, form):
    """Margins a million wide would be 4 TB and more."""
    cam, image, grad = drawn(1, 2, 2, 4, 3)
    options = {"dilations": (1, 1_000_000), "steps": 2, "form": form, "backend": backend}
    ours = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)
    exact = with_gradient(lambda x: refined(x, image, (1, 1_000_000), 2, form), cam, grad)
    assert all(error(a, e) < 1e-13 for a, e in zip(ours, exact))


def test_errors_say_what_was_given(backend):
    ok, image = torch.ones(1, 2, 4, 5), torch.ones(1, 3, 4, 5)
    for cam, guide, words in [
        (ok, torch.ones(1, 3, 5, 4), r"of the same B, H and W; got \[1, 2, 4, 5\] and \[1, 3, 5, 4\]"),
        (ok, torch.ones(2, 3, 4, 5), "same B"),
        (ok[0], image[0], r"got \[2, 4, 5\]"),
        (ok[:0], image[:0], "not be empty"),
        (ok[:, :0], image, "not be empty"),
        (ok, image[:, :0], "not be empty"),
        (ok.int(), image, "floating point.*int32"),
        (ok, image.to(torch.complex64), "complex64"),
        (ok, torch.ones(1, 3, 4, 5, device="meta"), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            pixel_adaptive_refinement(cam, guide, backend=backend)
    for options, words in [
        ({"dilations": ()}, r"got \(\)"),
        ({"dilations": 3}, "must be a list of at least one distance.*got 3"),
        ({"dilations": (1, 0)}, r"at least one distance of 1.*got .1, 0"),
        ({"steps": -1}, "steps must be at least 0; got -1"),
        ({"form": "crf"}, "form must be one of pamr, par; got 'crf'"),
    ]:
        with pytest.raises(ValueError, match=words):
            pixel_adaptive_refinement(ok, image, **options, backend=backend)


def test_a_backend_without_it_says_so(backend):
    cam, image, _ = drawn(1, 2, 3, 4, 5)
    assert _backends.named("cuda", "backend").launcher.can_run("pixel_adaptive_refinement", cam, image) is not None
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run pixel_adaptive_refinement"):
        pixel_adaptive_refinement(cam, image, backend="cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_property(backend, data):
    b, c, k, h, w = (data.draw(st.integers(1, most), label=name) for name, most in
                     (("B", 2), ("C", 19), ("K", 4), ("H", 20), ("W", 70)))
    dilations = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="dilations")
    form = data.draw(st.sampled_from(FORMS), label="form")
    cam, image, grad = drawn(b, c, k, h, w)
    options = {"dilations": dilations, "steps": 2, "form": form, "backend": backend}
    ours = with_gradient(lambda x: pixel_adaptive_refinement(x, image, **options), cam, grad)
    exact = with_gradient(lambda x: refined(x, image, dilations, 2, form), cam, grad)
    for mine, truth in zip(ours, exact):
        assert_within_budget(mine, truth, truth)


PEAK = """
import re, sys
from pathlib import Path
import torch
from ercn.ops import pixel_adaptive_refinement

def high_water():
    return 1024 * int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

pixel_adaptive_refinement(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), backend=sys.argv[1])
cam, image = torch.rand(1, 1, 768, 768), torch.rand(1, 1, 768, 768)
before = high_water()
pixel_adaptive_refinement(cam, image, steps=1, backend=sys.argv[1])
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the memory of a process")
def test_neighbours_are_not_copied_nor_large_weights_kept(backend):
    environment = os.environ | {"PYTHONPATH": str(Path(ercn.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, backend], env=environment, check=True, capture_output=True, text=True
    )
    planes = int(run.stdout) / (4 * 768 * 768)
    assert planes < (10 if backend == "cpu" else 80)  # 48 are the weights of all neighbours, 96 with copies


def test_docstring_examples(backend):
    import doctest

    from ercn.ops import refinement

    result = doctest.testmod(refinement)
    assert result.attempted and not result.failed


def test_readme_of_the_data_names_every_file(backend):
    folder = Path(__file__).parents[1] / "data" / "golden"
    named = set(re.findall(r"[\w.]+\.(?:npz|json)", (folder / "README.md").read_text()))
    assert named == {path.name for path in folder.glob("*.[nj]*")}
