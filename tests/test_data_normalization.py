import numpy as np
import pytest
import torch
from _datasets import photograph, write_aptos_tree
from PIL import Image

from ercn.config import DataConfig, PrepareConfig, TrainConfig
from ercn.data import Geometry, Manifest, PictureDataset, prepare
from ercn.data.normalization import graham, prepared
from ercn.training.evaluation import check_normalization
from ercn.training.fit import describe
from ercn.training.prediction import RawPictures

SMALL = {"size": 96, "workers": 1, "progress": False}


def inside(size, share):
    y, x = np.ogrid[:size, :size]
    return np.hypot(y + 0.5 - size / 2, x + 0.5 - size / 2) <= share * size / 2


def test_the_formula():
    """Graham's, with the Gaussian as an explicit sum, away from the borders where the sum would leave the picture."""
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
        name: prepare(PrepareConfig(out=str(root / name), normalize=name, **options)) for name in ("none", "graham")
    }


def test_prepared_folders_know_how_they_were_made(folders):
    root, made = folders
    manifests = {name: Manifest.load(folder) for name, folder in made.items()}
    assert {name: manifest.normalize for name, manifest in manifests.items()} == {"none": "none", "graham": "graham"}
    assert manifests["none"].records[0].geometry == manifests["graham"].records[0].geometry
    np.testing.assert_allclose(manifests["graham"].mean, 128 / 255, atol=0.02)
    with pytest.raises(ValueError, match=r"prepared with other settings: normalize=None \(now 'graham'\)"):
        options = {"dataset": "aptos", "root": str(root / "aptos"), **SMALL}
        prepare(PrepareConfig(out=str(made["none"]), normalize="graham", **options))


@pytest.mark.parametrize("name", ["none", "graham"])
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
    check_normalization(describe(TrainConfig(), plain), plain)
    with pytest.raises(
        ValueError, match="trained on pictures of `ercn prepare --normalize graham`, but .*none was prep"
    ):
        check_normalization(describe(TrainConfig(), other), plain)
