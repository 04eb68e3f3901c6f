"""The maps A: permutations are exact, others agree between resolutions; draws depend on the generator only."""

import pytest
import torch
import torch.nn.functional as F

from ercn.transforms import Affine, Flip, Identity, Rescale, Rot90, sample_transform

STRIDE = 8  # pixels per element of the map
SIZES = {True: (65, 97), False: (64, 96)}  # height, width of a picture by whether corners are aligned
MAPS = {True: (9, 13), False: (8, 12)}
both_alignments = pytest.mark.parametrize("align_corners", [True, False])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def centers(n, align_corners):
    """Coordinates of n elements of the field of view, from -1 to 1 between the outer centres or the outer edges."""
    if align_corners:
        return torch.linspace(-1, 1, n, dtype=torch.float64)
    return (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1


def ramps(h, w, align_corners):
    """[1, 2, h, w]: each element holds its own x and y."""
    y, x = torch.meshgrid(centers(h, align_corners), centers(w, align_corners), indexing="ij")
    return torch.stack([x, y])[None]


def to_map(x, align_corners):
    """A map function that commutes with every A on ramps: every STRIDE-th pixel, or the mean of STRIDE × STRIDE."""
    return x[..., ::STRIDE, ::STRIDE] if align_corners else F.avg_pool2d(x, STRIDE)


@both_alignments
@pytest.mark.parametrize("transform", [Identity(), Flip(2), Flip(3), Rot90(1), Rot90(2), Rot90(3)])
def test_permutations_are_exact_and_invertible(transform, align_corners):
    x = torch.randn(2, 3, *SIZES[align_corners])
    y = transform(x)
    assert torch.equal(transform.inverse()(y), x)
    assert torch.equal(y.flatten(2).sort(-1).values, x.flatten(2).sort(-1).values)
    moved = to_map(y, align_corners)
    assert moved.shape[2:] in (MAPS[align_corners], MAPS[align_corners][::-1])
    torch.testing.assert_close(moved, transform(to_map(x, align_corners)), rtol=0, atol=1e-6)  # 64 in another order
    assert transform.valid(*y.shape[-2:]).all()


def test_flip_and_rot90_go_where_they_say():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert Flip(3)(x)[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert Flip(2)(x)[0, 0].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert Rot90(1)(x)[0, 0].tolist() == [[2, 5], [1, 4], [0, 3]]


@both_alignments
@pytest.mark.parametrize("factor", [0.3, 0.5, 0.77, 1.0])
def test_rescale_moves_nothing_at_either_resolution(factor, align_corners):
    def pointwise(x):
        return 3 * x - 1

    for h, w in (SIZES[align_corners], MAPS[align_corners]):
        x = ramps(h, w, align_corners)
        y = Rescale(factor, align_corners)(x)
        assert y.shape[-2:] == (round(h * factor), round(w * factor))
        torch.testing.assert_close(y, ramps(*y.shape[-2:], align_corners), rtol=0, atol=1e-12)
        torch.testing.assert_close(Rescale(factor, align_corners)(pointwise(x)), pointwise(y), rtol=0, atol=1e-12)


def test_rescale_is_seams():
    x = torch.randn(2, 3, 50, 60)
    expected = F.interpolate(x, scale_factor=0.3, mode="bilinear", align_corners=True)
    assert torch.equal(Rescale(0.3)(x), expected)
    assert Rescale(0.3)(torch.randn(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@both_alignments
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["translate", "affine"])
def test_affine_ramps_hold_the_source_coordinates_at_both_resolutions(kind, seed, align_corners):
    size = SIZES[align_corners]
    transform = sample_transform(kind, generator(seed), size=size, align_corners=align_corners)
    a, b, c, d, e, f = transform.theta
    for h, w in (size, MAPS[align_corners]):
        x, y = ramps(h, w, align_corners)[0]
        source = torch.stack([a * x + b * y + c, d * x + e * y + f])
        valid = transform.valid(h, w)
        assert valid.any() and valid.shape == (h, w)
        # 1e-3 of a pixel is what valid() allows outside
        moved = transform(ramps(h, w, align_corners))[0]
        torch.testing.assert_close(moved[:, valid], source[:, valid], rtol=0, atol=2e-3 / min(h, w))
        edge = torch.tensor([1.0, 1.0] if align_corners else [1 - 1 / w, 1 - 1 / h], dtype=torch.float64)[:, None, None]
        inside = (source.abs() <= edge).all(0)
        assert (valid | ~inside).all()
        assert (~valid | (source.abs() <= edge + 2e-3 / (min(h, w) - align_corners)).all(0)).all()


@both_alignments
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["translate", "affine"])
def test_affine_commutes_with_the_map_function(kind, seed, align_corners):
    size = SIZES[align_corners]
    transform = sample_transform(kind, generator(seed), size=size, align_corners=align_corners)
    picture = ramps(*size, align_corners)
    before, after = to_map(transform(picture), align_corners), transform(to_map(picture, align_corners))
    # An element counts where all of its pixels show the picture and its own center does.
    whole = to_map(transform.valid(*size)[None, None].double(), align_corners)[0, 0] == 1
    keep = whole & transform.valid(*after.shape[-2:])
    assert keep.float().mean() > 0.2
    torch.testing.assert_close(before[0][:, keep], after[0][:, keep], rtol=0, atol=1e-3)


@both_alignments
def test_translation_moves_whole_pixels(align_corners):
    h, w = size = SIZES[align_corners]
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    for seed in range(5):
        transform = sample_transform("translate", generator(seed), size=size, align_corners=align_corners)
        shifts = transform.theta[2] * (w - align_corners) / 2, transform.theta[5] * (h - align_corners) / 2
        dx, dy = map(round, shifts)
        assert shifts == pytest.approx((dx, dy), abs=1e-12)
        assert abs(dx) <= round(0.15 * w) and abs(dy) <= round(0.15 * h)
        rows, columns = torch.meshgrid(torch.arange(h) + dy, torch.arange(w) + dx, indexing="ij")
        inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
        assert torch.equal(transform.valid(*size), inside)
        expected = x[0, 0][rows[inside], columns[inside]]
        torch.testing.assert_close(transform(x)[0, 0][inside], expected, rtol=0, atol=1e-12)


@both_alignments
def test_affine_rotates_pixels_without_shear(align_corners):
    size = SIZES[align_corners]
    a, b, _, d, e, _ = sample_transform("affine", generator(3), size=size, align_corners=align_corners).theta
    h, w = (side - align_corners for side in size)
    matrix = torch.tensor([[a, b * w / h], [d * h / w, e]], dtype=torch.float64)  # in pixels
    product = matrix.T @ matrix
    torch.testing.assert_close(product, product[0, 0] * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0.8 <= product[0, 0].item() ** -0.5 <= 1.25


def test_outside_repeats_the_border_and_half_precision_keeps_coordinates():
    for align_corners, width in ((False, 8), (True, 9)):
        shift = Affine((1.0, 0.0, 0.5, 0.0, 1.0, 0.0), align_corners)  # a quarter of the width
        x = torch.arange(float(width)).expand(1, 1, 2, width)
        assert shift(x)[0, 0, 0].tolist() == [*range(2, width), width - 1, width - 1]
        assert shift.valid(2, width)[0].tolist() == [True] * (width - 2) + [False] * 2
    y = torch.randn(1, 2, 16, 400)
    half = shift(y.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, shift(y.bfloat16().float()).bfloat16())


def draw(kind, generator, **settings):
    return sample_transform(kind, generator, size=96, align_corners=True, **settings)


@both_alignments
@pytest.mark.parametrize("kind", ["rescale", "translate", "affine"])
def test_the_alignment_is_the_models(kind, align_corners):
    assert sample_transform(kind, generator(), size=96, align_corners=align_corners).align_corners is align_corners


@pytest.mark.parametrize("kind", ["rescale", "flip", "rot90", "translate", "affine", "all", "none"])
def test_draws_are_a_function_of_the_generator(kind):
    state = torch.get_rng_state()
    first, second = ([draw(kind, g) for _ in range(20)] for g in (generator(1), generator(1)))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(2, 3, 96, 96)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(first, second))


def test_all_draws_every_kind():
    drawn = {type(draw("all", g)) for g in [generator(2)] for _ in range(100)}
    assert drawn == {Rescale, Flip, Rot90, Affine}
    flips = {draw("flip", g) for g in [generator(2)] for _ in range(50)}
    turns = {draw("rot90", g) for g in [generator(2)] for _ in range(50)}
    assert flips == {Flip(2), Flip(3)} and turns == {Rot90(1), Rot90(2), Rot90(3)}
    assert draw("none", None) == Identity()


def test_errors():
    with pytest.raises(ValueError, match="unknown transform 'shear'; known: rescale, flip"):
        draw("shear", None)
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"rescale must be in \(0, 1\]"):
            draw("rescale", None, rescale=factor)


@both_alignments
@pytest.mark.parametrize("kind", ["rescale", "flip", "rot90", "translate", "affine"])
def test_gradients(kind, align_corners):
    transform = sample_transform(kind, generator(), size=(6, 8), align_corners=align_corners)
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, x)
