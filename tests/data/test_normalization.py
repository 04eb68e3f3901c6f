from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _datasets import photograph, write_aptos_tree
from PIL import Image

from ercn.config import DataConfig, PrepareConfig, TrainConfig
from ercn.data import Geometry, Manifest, PictureDataset, prepare
from ercn.data.normalization import NORMALIZATIONS, graham, local, prepared, surround
from ercn.evaluation.evaluating import check_normalization
from ercn.evaluation.predicting import RawPictures
from ercn.training.fit import describe
from ercn.training.loaders import GradedData, PictureData

SMALL = {"size": 96, "workers": 1, "progress": False}


def inside(size, share):
    y, x = np.ogrid[:size, :size]
    return np.hypot(y + 0.5 - size / 2, x + 0.5 - size / 2) <= share * size / 2


def test_the_formula():
    """Graham's formula with the Gaussian as an explicit sum, inside of the picture, where the sum needs no borders."""
    size, sigma = 60, 30 / 30
    x = np.random.default_rng(0).integers(90, 120, (size, size, 3))
    span = np.arange(-8, 9)
    kernel = np.exp(-(span**2) / (2 * sigma**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    out = np.asarray(graham(Image.fromarray(x.astype(np.uint8))))
    for row, column in [(30, 30), (20, 41), (12, 30)]:
        blurred = np.tensordot(kernel, x[row - 8 : row + 9, column - 8 : column + 9], 2)
        np.testing.assert_allclose(out[row, column], np.clip(4 * x[row, column] - 4 * blurred + 128, 0, 255), atol=0.51)


def test_even_pictures_and_all_beyond_the_circle_are_gray():
    assert (np.asarray(graham(Image.new("RGB", (50, 50), (200, 90, 10)))) == 128).all()
    out = np.asarray(graham(Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))))
    assert (out[~inside(80, 0.9)] == 128).all() and (out[inside(80, 0.9)] != 128).mean() > 0.9


def disc(size, share, color):
    """A picture of one color within ``share`` of the half side, black beyond."""
    return np.where(inside(size, share)[..., None], np.array(color, np.uint8), np.uint8(0))


def test_the_formula_of_local():
    """In float64, the Gaussian as a matrix, edges mirrored; 128 in the black surround and in the corners."""
    size, sigma = 60, 30 / 15
    x = np.random.default_rng(0).integers(20, 220, (size, size, 3)).astype(np.uint8)
    x[:, :7] = np.array([8, 3, 0])  # a strip that the disc does not fill
    span = np.arange(-8, 9)  # four sigma
    kernel = np.exp(-(span**2) / (2 * sigma**2))
    rows = np.pad(np.eye(size), ((8, 8), (0, 0)), mode="symmetric")
    gauss = np.einsum("k,knm->nm", kernel / kernel.sum(), np.stack([rows[k : k + size] for k in range(17)]))
    field = (inside(size, 0.97) & (x.max(2) > 8))[..., None]
    mean = np.einsum("ij,jkc,lk->ilc", gauss, field * x.astype(float), gauss)
    share = np.einsum("ij,jkc,lk->ilc", gauss, field.astype(float), gauss)
    expected = np.where(field, 4 * x.astype(float) - 4 * mean / np.maximum(share, 1e-30) + 128, 128)
    out = np.asarray(local(Image.fromarray(x)))
    assert out.dtype == np.uint8 and (out[~field[..., 0]] == 128).all() and 0 in out and 255 in out
    np.testing.assert_allclose(out, np.clip(expected, 0, 255), rtol=0, atol=0.5 + 1e-3)


@pytest.mark.parametrize("share", [0.6, 0.9, 1.2])
def test_after_local_an_even_field_is_gray_to_its_edge(share):
    picture = Image.fromarray(disc(80, share, (200, 90, 10)))
    assert (np.asarray(local(picture)) == 128).all()
    if share < 0.9:
        assert (np.asarray(graham(picture))[inside(80, share)] > 200).any()  # its mean includes the black beyond
    assert (np.asarray(local(Image.new("RGB", (50, 50), (8, 8, 8)))) == 128).all()  # no field


def test_after_local_a_lesion_keeps_its_inside():
    """A lesion of a tenth of the radius: the mean of R / 30 removes what is even over three times that."""
    picture = disc(200, 0.95, (180, 90, 40))
    row, column = np.ogrid[:200, :200]
    spot = np.hypot(row - 90, column - 120) <= 7
    picture[spot] = (150, 60, 30)
    wide, narrow = (np.asarray(method(Image.fromarray(picture)), float)[90, 120] for method in (local, graham))
    assert (wide < narrow - 10).all() and (wide < 90).any()


def test_the_surround_is_that_of_the_prepared_picture():
    picture = photograph(0, 3)[0]
    geometry = Geometry(*picture.size, 0, 0, picture.width, 96)
    for name in NORMALIZATIONS:
        corners = np.asarray(prepared(picture, geometry, name), float)[~inside(96, 1.05)]
        assert np.abs(corners - surround(name)).max() < 16, name  # JPEG


def test_lighting_and_color_of_the_retina_do_not_matter_much_and_lesions_stay():
    picture = photograph(0, 3)[0]
    x = np.asarray(picture, float)
    y = x * np.linspace(0.6, 1, x.shape[1])[None, :, None] * (1, 0.8, 0.9)
    dim = Image.fromarray(y.round().astype(np.uint8))
    geometry = Geometry(*picture.size, 0, 0, picture.width, 128)
    plain = [np.asarray(prepared(p, geometry, "none"), float)[inside(128, 0.85)] for p in (picture, dim)]
    even = [np.asarray(prepared(p, geometry, "graham"), float)[inside(128, 0.85)] for p in (picture, dim)]
    assert np.abs(even[0].mean(0) - 128).max() < 6  # the mean color is gone
    assert np.abs(even[0] - even[1]).mean() < 0.5 * np.abs(plain[0] - plain[1]).mean()
    assert even[0].std() > 0.3 * plain[0].std()


def test_the_size_of_the_prepared_picture_does_not_change_what_is_seen():
    picture = photograph(0, 3)[0]
    half, whole = (
        np.asarray(
            prepared(picture, Geometry(*picture.size, 0, 0, picture.width, size), "graham").resize((40, 40)), float
        )
        for size in (80, 160)
    )
    assert np.corrcoef(half[inside(40, 0.85)].ravel(), whole[inside(40, 0.85)].ravel())[0, 1] > 0.8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("normalized")
    write_aptos_tree(root / "aptos")
    options = {"dataset": "aptos", "root": str(root / "aptos"), **SMALL}
    return root, {
        name: prepare(PrepareConfig(out=str(root / name), normalize=name, **options)) for name in NORMALIZATIONS
    }


def test_prepared_folders_know_how_they_were_made(folders):
    root, made = folders
    manifests = {name: Manifest.load(folder) for name, folder in made.items()}
    assert list(manifests) == ["none", "graham", "local"]
    assert all(manifest.normalize == name for name, manifest in manifests.items())
    assert manifests["none"].records[0].geometry == manifests["graham"].records[0].geometry
    for name in ("graham", "local"):
        np.testing.assert_allclose(manifests[name].mean, 128 / 255, atol=0.02)
    with pytest.raises(ValueError, match=r"prepared with other settings: normalize=None \(now 'graham'\)"):
        options = {"dataset": "aptos", "root": str(root / "aptos"), **SMALL}
        prepare(PrepareConfig(out=str(made["none"]), normalize="graham", **options))


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_prediction_sees_what_training_saw(folders, name):
    manifest = Manifest.load(folders[1][name])
    info = describe(TrainConfig(data=DataConfig(image_size=96)), manifest)
    paths = [folders[0] / "aptos" / record.source for record in manifest.records]
    raw = RawPictures(paths, info, 10**8)
    trained = PictureDataset(manifest.records, 96, mean=manifest.mean, std=manifest.std, augment=False)
    for index in range(len(paths)):
        a, b = raw[index]["image"], trained[index]["image"]
        levels = (a - b).abs() * torch.tensor(manifest.std).view(3, 1, 1) * 255
        assert levels.mean() < 3, index  # JPEG


def test_a_model_is_not_evaluated_on_pictures_prepared_in_another_way(folders):
    plain, other = (Manifest.load(folders[1][name]) for name in ("none", "graham"))
    check_normalization(describe(TrainConfig(), plain).normalize, plain)
    with pytest.raises(
        ValueError, match="trained on pictures of `ercn prepare --normalize graham`, but .*none was prep"
    ):
        check_normalization(describe(TrainConfig(), other).normalize, plain)


@pytest.mark.parametrize("kind", [GradedData, PictureData])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_turned_pictures_are_filled_with_their_surround(folders, name, kind):
    """Views of the training loader: beyond the disc every turned view has the level of the surround."""
    manifest = Manifest.load(folders[1][name])
    data = kind(manifest, DataConfig(image_size=96, workers=0), seed=0)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    pictures, levels = data.train_dataloader().dataset, []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (manifest.mean, manifest.std))
    for epoch in range(6):
        pictures.set_epoch(epoch)
        for item in map(pictures.__getitem__, range(3)):
            views = item.get("views", item.get("image")).view(-1, 3, 96, 96)
            levels.append(((views * std + mean) * 255)[..., (0, 0, -1, -1), (0, -1, 0, -1)])
    levels = torch.cat(levels)  # [V, 3, 4]
    filled = levels.flatten(1).amax(1) - levels.flatten(1).amin(1) < 12  # a contrastive crop may have no corner
    assert filled.float().mean() > (0.99 if kind is GradedData else 0.3)
    around = levels[filled].mean((1, 2))
    if name == "none":
        assert (around < 64).all()  # less contrast makes black gray
    else:
        assert ((around - 128).abs() < 8).all()
