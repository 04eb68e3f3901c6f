"""The references of heat maps: unlearned filters and the supervised ceiling."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from _datasets import write_aptos_tree
from PIL import Image
from scipy import ndimage

from ercn import cli
from ercn.config import CeilingConfig, DataConfig, PrepareConfig, RunConfig
from ercn.data import Manifest, Record, prepare
from ercn.data.geometry import Geometry
from ercn.data.loading import picture_dataset
from ercn.data.normalization import graham
from ercn.data.phantom import render_phantom
from ercn.evaluation.filters import FILTERS, contrasts, field
from ercn.evaluation.localization import Localization, average_precision, histograms, levels_of, precision_recall
from ercn.evaluation.unet import UNet, load_ceiling
from ercn.training import train_ceiling
from ercn.training.ceiling import Supervised, annotated, lesions_of, squares


def fundus(size, radius=0.97, level=(150, 90, 40)):
    """A uniform round field on black with a soft edge, uint8 [S, S, 3], and each pixel's distance from its center."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    distance = np.hypot(x, y)
    light = np.clip((radius - distance) * size / 2 + 0.5, 0, 1)
    return np.round(light[..., None] * np.array(level)).astype(np.uint8), distance


def dotted(picture, change, at=(0.4, 0.6), radius=0.015):
    """The picture with a round brighter or darker dot, and the dot's mask."""
    y, x = (np.mgrid[: len(picture), : len(picture)] + 0.5) / len(picture)
    dot = np.hypot(y - at[0], x - at[1]) < radius
    return np.where(dot[..., None], picture.astype(int) + change, picture).astype(np.uint8), dot


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [97, 160, 257])
def test_a_filter_finds_its_dot_and_nothing_in_an_even_field_or_at_its_edge(name, size):
    picture, _ = fundus(size)
    assert FILTERS[name](picture).max() < 1e-5
    assert FILTERS[name](np.full((size, size, 3), 90, np.uint8)).max() < 1e-5
    signs = {"dark": (-40,), "black": (-40,), "bright": (40,), "white": (40,)}.get(name.split("_")[0], (-40, 40))
    for change in (-40, 40):
        heat = FILTERS[name](dotted(picture, change)[0])
        dot = dotted(picture, change)[1]
        if change in signs:
            near = ndimage.binary_dilation(dot, iterations=round(0.02 * size))
            assert heat[dot].max() > 0.05 and near[np.unravel_index(heat.argmax(), heat.shape)]
        else:
            assert heat[dot].max() == 0
        assert heat.dtype == np.float32 and heat.shape == (size, size) and 0 <= heat.min() and heat.max() <= 1


def test_maps_have_one_scale_in_all_pictures():
    """A dot is as hot beside a stronger one as alone, and at another size nearly as hot."""
    picture, _ = fundus(257)
    one, dot = dotted(picture, -30)
    two, _ = dotted(one, 100, at=(0.6, 0.3))
    alone, beside, small = contrasts(one), contrasts(two), contrasts(dotted(fundus(161)[0], -30)[0])
    for name in FILTERS:
        assert np.array_equal(alone[name], FILTERS[name](one))
        assert beside[name][dot].max() == pytest.approx(alone[name][dot].max(), abs=1e-5)
        assert small[name].max() == pytest.approx(alone[name].max(), rel=0.35, abs=1e-5)
    assert alone["dark_33"][dot].max() == pytest.approx(2 * 30 / 255, rel=0.2)  # 2 |x - mean|


def test_the_field_is_found_whatever_its_light():
    """A vignette, a cut field, a black lesion, Graham's gray border, and no border at all."""
    picture, distance = fundus(257)
    ring = 2 * 4 / 256
    inside = distance < 0.97 - ring - 0.02
    for seen in (picture, (picture * (1 - 0.8 * distance.clip(0, 1)[..., None] ** 2)).astype(np.uint8)):
        assert field(seen)[inside].all() and not field(seen)[distance > 0.965].any()
    cut, spotted = picture.copy(), dotted(picture, -picture.astype(int), at=(0.5, 0.88), radius=0.05)[0]
    cut[:30] = cut[-30:] = 0
    assert not field(cut)[:30].any() and field(cut)[40:-40][inside[40:-40]].all()
    assert field(spotted)[distance < 0.9].all()
    tissue = np.random.default_rng(0).integers(90, 130, (257, 257, 3)).astype(np.uint8)
    assert field(tissue).all()
    rendered, _ = render_phantom(3, "left", 4, 257, 0)
    gray = np.asarray(graham(Image.fromarray(rendered)))
    assert not field(gray)[distance > 0.91].any() and field(gray)[distance < 0.8].all()


def test_a_filter_takes_pictures_only():
    with pytest.raises(ValueError, match=r"uint8 \[S, S, 3\]; got float32 \[3, 64, 64\]"):
        FILTERS["box_17"](np.zeros((3, 64, 64), np.float32))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every grade in train and val."""
    out = tmp_path_factory.mktemp("masks") / "data"
    prepare(PrepareConfig(patients=16, size=97, out=str(out), fractions=(0.5, 0.3, 0.2), progress=False, workers=0))
    return out


def config_of(root, out, epochs=2, **run):
    return CeilingConfig(
        data=DataConfig(root=str(root), image_size=97, batch_size=4, workers=0),
        run=RunConfig(out=str(out), epochs=epochs, accelerator="cpu", progress=False, **run),
        width=4,
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return train_ceiling(config_of(data, tmp_path_factory.mktemp("ceiling") / "run"))


def annotated_pictures(data, split):
    manifest = Manifest.load(data)
    config = DataConfig(root=str(data), image_size=97)
    records = annotated(manifest.split(split))
    return picture_dataset(records, manifest.mean, manifest.std, config, seed=0, augment=False, with_masks=True)


@pytest.mark.parametrize("size", [64, 97, 160, 161])
def test_the_network_takes_any_size_and_its_padding_repeats_the_border(size):
    torch.manual_seed(0)
    network, image = UNet(4).eval(), torch.randn(2, 3, size, size)
    logits = network(image)
    more = torch.nn.functional.pad(image, (0, -size % 8) * 2, mode="replicate")
    assert logits.shape == (2, size, size) and torch.equal(logits, network(more)[:, :size, :size])


def test_the_network_learns_four_pictures_by_heart(data):
    items = [item for item in annotated_pictures(data, "train") if item["masks"][:-1].sum() > 30][:4]
    image = torch.stack([item["image"] for item in items])
    lesion = lesions_of({"masks": torch.stack([item["masks"] for item in items])})
    torch.manual_seed(0)
    network = UNet(8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(network(image), lesion.float()).backward()
        optimizer.step()
    heat = network.eval()(image).sigmoid().detach().numpy()
    counts = histograms(levels_of(heat), lesion.numpy(), np.ones(heat.shape, bool))
    precision, recall, _ = precision_recall(counts[None])
    assert len(items) == 4 and average_precision(precision, recall)[0] > 0.8


def test_a_picture_and_its_lesions_move_together(monkeypatch):
    monkeypatch.setattr("ercn.training.ceiling.JITTER", 0)
    torch.manual_seed(0)
    lesion = torch.zeros(200, 161, 161)
    lesion[:, 100:103, 20:25] = 1
    lesion[150:] = 0
    image = torch.stack([lesion, 2 * lesion, torch.rand(200, 161, 161)], 1)
    part, mask = squares(image, lesion)
    assert part.shape == (200, 3, 80, 80) and torch.equal(part[:, 0], mask) and torch.equal(part[:, 1], 2 * mask)
    there = mask[:150].flatten(1).any(1)
    shapes = {tuple((np.ptp(m.nonzero().numpy(), 0) + 1).tolist()) for m in mask[:150][there]}
    assert 0.5 < there.float().mean() < 0.95 and {(3, 5), (5, 3)} <= shapes and not mask[150:].any()


def test_pictures_of_sick_eyes_without_masks_are_left_out():
    place = Geometry(8, 8, 0, 0, 8, 8)
    grades = (("a", 0, {}), ("b", 2, {}), ("c", 2, {"dots": Path("m.png")}), ("d", None, {}))
    records = [Record(id, Path(id), grade, id, "train", masks, place) for id, grade, masks in grades]
    assert [record.id for record in annotated(records)] == ["a", "c", "d"]


def test_the_export_is_the_best_epoch_and_gives_its_maps(data, trained):
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ceiling = load_ceiling(trained)
    best = max(rows, key=lambda row: float(row["val_aupr"]))
    assert (ceiling.info["val_aupr"], ceiling.info["epoch"]) == (float(best["val_aupr"]), int(best["epoch"]))
    manifest = Manifest.load(data)
    assert ceiling.info["mean"] == list(manifest.mean) and ceiling.info["manifest"] == manifest.hash
    found = Localization()
    pictures = annotated_pictures(data, "val")
    for item in pictures:
        heat = ceiling(item["image"][None])
        assert heat.shape == (1, 97, 97) and 0 <= heat.min() and heat.max() <= 1
        masks = dict(zip(pictures.mask_kinds, item["masks"].numpy()))
        found.add({"ceiling": heat[0].numpy()}, masks, str(item["index"]), masks.pop("optic_disc"))
    aupr = found.summary({}, draws=0, seed=0).maps["ceiling"]["aupr"].value
    assert aupr == pytest.approx(ceiling.info["val_aupr"], rel=1e-3)  # single pictures round differently from batches


def test_interrupted_and_resumed_it_ends_with_the_same_weights(data, trained, tmp_path, monkeypatch):
    step = Supervised.training_step

    def stop(self, batch, index):
        if self.current_epoch == 1 and index == 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Supervised, "training_step", stop)
        train_ceiling(config_of(data, tmp_path / "run"))
    again = load_ceiling(train_ceiling(config_of(data, tmp_path / "run", resume=True))).network.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in load_ceiling(trained).network.state_dict().items())


def test_data_without_masks_and_several_devices_are_told_in_a_sentence(data, tmp_path, capsys):
    write_aptos_tree(tmp_path / "aptos")
    root = prepare(
        PrepareConfig(dataset="aptos", root=str(tmp_path / "aptos"), out=str(tmp_path / "data"), size=64, workers=0)
    )
    capsys.readouterr()
    for argv, words in (
        (["--data.root", str(root)], f"error: {root} has no picture with a lesion mask in the train split; "),
        (["--data.root", str(data), "--run.devices", "2"], "one device"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["ceiling", *argv, "--run.out", str(tmp_path / "run")])
        assert exit.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "run").exists()
