"""The maps A: exact where they are permutations, aligned between resolutions elsewhere, functions of the generator."""

import pytest
import torch
import torch.nn.functional as F

from ercn.transforms import Affine, Flip, Identity, Rescale, Rot90, sample_transform

SIZE = (64, 96)  # height, width of the picture
STRIDE = 8  # pixels per element of its map


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def centers(n):
    """Centers of n equal cells of the field of view, from -1 to 1 between its outer edges."""
    return (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1


def ramps(h, w, coordinates=centers):
    """[1, 2, h, w]: each element holds its own x and y."""
    y, x = torch.meshgrid(coordinates(h), coordinates(w), indexing="ij")
    return torch.stack([x, y])[None]


def to_map(x):
    """A map function that commutes with every A on ramps: the mean of each cell of STRIDE × STRIDE pixels."""
    return F.avg_pool2d(x, STRIDE)


@pytest.mark.parametrize("transform", [Identity(), Flip(2), Flip(3), Rot90(1), Rot90(2), Rot90(3)])
def test_permutations_are_exact_and_invertible(transform):
    x = torch.randn(2, 3, *SIZE)
    y = transform(x)
    assert torch.equal(transform.inverse()(y), x)
    assert torch.equal(y.flatten(2).sort(-1).values, x.flatten(2).sort(-1).values)
    torch.testing.assert_close(to_map(y), transform(to_map(x)), rtol=0, atol=1e-6)  # 64 values in another order
    assert transform.valid(*y.shape[-2:]).all()


def test_flip_and_rot90_go_where_they_say():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert Flip(3)(x)[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert Flip(2)(x)[0, 0].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert Rot90(1)(x)[0, 0].tolist() == [[2, 5], [1, 4], [0, 3]]


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.77, 1.0])
def test_rescale_aligns_corners_at_both_resolutions(factor):
    def corners(n):
        return torch.linspace(-1, 1, n, dtype=torch.float64)

    def pointwise(x):
        return 3 * x - 1

    for h, w in (SIZE, (SIZE[0] // STRIDE, SIZE[1] // STRIDE)):
        x = ramps(h, w, corners)
        y = Rescale(factor)(x)
        assert y.shape[-2:] == (round(h * factor), round(w * factor))
        torch.testing.assert_close(y, ramps(*y.shape[-2:], corners), rtol=0, atol=1e-12)
        torch.testing.assert_close(Rescale(factor)(pointwise(x)), pointwise(y), rtol=0, atol=1e-12)


def test_rescale_is_seams():
    x = torch.randn(2, 3, 50, 60)
    expected = F.interpolate(x, scale_factor=0.3, mode="bilinear", align_corners=True)
    assert torch.equal(Rescale(0.3)(x), expected)
    assert Rescale(0.3)(torch.randn(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["translate", "affine"])
def test_affine_ramps_hold_the_source_coordinates_at_both_resolutions(kind, seed):
    transform = sample_transform(kind, generator(seed), size=SIZE)
    a, b, c, d, e, f = transform.theta
    for h, w in (SIZE, (SIZE[0] // STRIDE, SIZE[1] // STRIDE)):
        x, y = ramps(h, w)[0]
        source = torch.stack([a * x + b * y + c, d * x + e * y + f])
        valid = transform.valid(h, w)
        assert valid.any() and valid.shape == (h, w)
        # 1e-3 of a pixel is what valid() allows outside
        torch.testing.assert_close(transform(ramps(h, w))[0][:, valid], source[:, valid], rtol=0, atol=2e-3 / min(h, w))
        edge = torch.tensor([1 - 1 / w, 1 - 1 / h], dtype=torch.float64)[:, None, None]
        inside = (source.abs() <= edge).all(0)
        assert (valid | ~inside).all()
        assert (~valid | (source.abs() <= edge + 2e-3 / min(h, w)).all(0)).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["translate", "affine"])
def test_affine_commutes_with_the_map_function(kind, seed):
    transform = sample_transform(kind, generator(seed), size=SIZE)
    picture = ramps(*SIZE)
    before, after = to_map(transform(picture)), transform(to_map(picture))
    # A cell counts where all of its pixels show the picture and its own center does.
    whole = F.avg_pool2d(transform.valid(*SIZE)[None, None].double(), STRIDE)[0, 0] == 1
    keep = whole & transform.valid(*after.shape[-2:])
    assert keep.float().mean() > 0.2
    torch.testing.assert_close(before[0][:, keep], after[0][:, keep], rtol=0, atol=1e-3)


def test_translation_moves_whole_pixels():
    x = torch.rand(1, 1, *SIZE, dtype=torch.float64)
    for seed in range(5):
        transform = sample_transform("translate", generator(seed), size=SIZE)
        dx, dy = round(transform.theta[2] * SIZE[1] / 2), round(transform.theta[5] * SIZE[0] / 2)
        assert abs(dx) <= round(0.15 * SIZE[1]) and abs(dy) <= round(0.15 * SIZE[0])
        rows, columns = torch.meshgrid(torch.arange(SIZE[0]) + dy, torch.arange(SIZE[1]) + dx, indexing="ij")
        inside = (rows >= 0) & (rows < SIZE[0]) & (columns >= 0) & (columns < SIZE[1])
        assert torch.equal(transform.valid(*SIZE), inside)
        expected = x[0, 0][rows[inside], columns[inside]]
        torch.testing.assert_close(transform(x)[0, 0][inside], expected, rtol=0, atol=1e-12)


def test_affine_rotates_pixels_without_shear():
    a, b, _, d, e, _ = sample_transform("affine", generator(3), size=SIZE).theta
    h, w = SIZE
    matrix = torch.tensor([[a, b * w / h], [d * h / w, e]], dtype=torch.float64)  # in pixels
    product = matrix.T @ matrix
    torch.testing.assert_close(product, product[0, 0] * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0.8 <= product[0, 0].item() ** -0.5 <= 1.25


def test_outside_repeats_the_border_and_half_precision_keeps_coordinates():
    shift = Affine((1.0, 0.0, 0.5, 0.0, 1.0, 0.0))  # a quarter of the width
    x = torch.arange(8.0).expand(1, 1, 2, 8)
    assert shift(x)[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7, 7, 7]
    assert shift.valid(2, 8)[0].tolist() == [True] * 6 + [False] * 2
    y = torch.randn(1, 2, 16, 400)
    half = shift(y.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, shift(y.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("kind", ["rescale", "flip", "rot90", "translate", "affine", "all", "none"])
def test_draws_are_a_function_of_the_generator(kind):
    state = torch.get_rng_state()
    first, second = ([sample_transform(kind, g, size=96) for _ in range(20)] for g in (generator(1), generator(1)))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(2, 3, 96, 96)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(first, second))


def test_all_draws_every_kind():
    drawn = {type(sample_transform("all", g, size=96)) for g in [generator(2)] for _ in range(100)}
    assert drawn == {Rescale, Flip, Rot90, Affine}
    flips = {sample_transform("flip", g, size=96) for g in [generator(2)] for _ in range(50)}
    turns = {sample_transform("rot90", g, size=96) for g in [generator(2)] for _ in range(50)}
    assert flips == {Flip(2), Flip(3)} and turns == {Rot90(1), Rot90(2), Rot90(3)}
    assert sample_transform("none", None, size=96) == Identity()


def test_errors():
    with pytest.raises(ValueError, match="unknown transform 'shear'; known: rescale, flip"):
        sample_transform("shear", None, size=96)
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"rescale must be in \(0, 1\]"):
            sample_transform("rescale", None, rescale=factor, size=96)


@pytest.mark.parametrize("kind", ["rescale", "flip", "rot90", "translate", "affine"])
def test_gradients(kind):
    transform = sample_transform(kind, generator(), size=(6, 8))
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, x)
