"""A lesion planted at known pixels of the photograph is hot at these pixels, whatever the frame around the fundus.

The network is a stub whose maps are how green the picture is, at full resolution or on either kind of coarse grid, so
the tests see only the geometry from the photograph to the network and back, and that of the lesion masks.
"""

import numpy as np
import pytest
from _stubs import Tents, info_of
from PIL import Image, ImageDraw

from ercn.config import DataConfig, ModelConfig, PredictConfig, PrepareConfig, RunConfig, TrainConfig
from ercn.data import Geometry, Manifest, prepare
from ercn.data.phantom import render_phantom
from ercn.evaluation import predicting as prediction
from ercn.evaluation.collecting import collect
from ercn.report.overlay import overlay
from ercn.training import predict

SIDE, RADIUS = 320, 16  # of the fundus in the photograph, of the lesion
# the side of the network's picture, its stride and whether its corners are aligned
NETWORKS = {"pixels": (128, 1, False), "cells": (128, 8, False), "corners": (129, 8, True), "resized": (128, 8, True)}
# width and height of the photograph, left and top of the fundus, the lesion in the fundus
FRAMES = {
    "wide": (480, 330, 80, 5, (100, 210)),
    "off_centre": (520, 360, 6, 34, (230, 90)),
    "cut_off": (400, 260, 44, -30, (150, 70)),
    "tall": (330, 500, 4, 150, (90, 150)),
    "notched": (460, 340, 60, 10, (240, 220)),
    "turned": (480, 330, 130, 5, (200, 110)),
}


def network(kind):
    """The stub, and what a run of it would have exported."""
    size, stride, align_corners = NETWORKS[kind]
    model = ModelConfig(confidence="relative", evidence="separate")  # a product of maps has a centroid of its own
    data, run = DataConfig(image_size=size, batch_size=1, workers=0), RunConfig(accelerator="cpu", progress=False)
    about = {"image_size": size, "prepared_size": 128, "mean": [0.0] * 3, "std": [1.0] * 3}
    return Tents(stride, align_corners), info_of(TrainConfig(data=data, model=model, run=run), **about)


def photograph(name):
    """The picture, and the center (x, y) and the mask of its lesion."""
    width, height, left, top, (x, y) = FRAMES[name]
    fundus = Image.fromarray(render_phantom(3, "left", 0, SIDE, 0)[0])
    picture = Image.new("RGB", (width, height), (3, 2, 2))
    picture.paste(fundus, (left, top))
    draw = ImageDraw.Draw(picture)
    if name == "notched":  # a tab beside the fundus and a wedge cut out of it, as cameras mark which way is up
        draw.rectangle([left + SIDE - 12, top + 60, left + SIDE + 14, top + 80], fill=(190, 90, 60))
        draw.polygon([(left, top + 150), (left + 30, top + 160), (left, top + 170)], fill=(3, 2, 2))
    mask = Image.new("L", picture.size)
    for canvas, fill in ((draw, (0, 255, 0)), (ImageDraw.Draw(mask), 255)):
        canvas.ellipse([left + x - RADIUS, top + y - RADIUS, left + x + RADIUS, top + y + RADIUS], fill=fill)
    return picture, (left + x + 0.5, top + y + 0.5), mask


def centroid(weight):
    """(x, y), pixel centers at k + 0.5."""
    weight = np.asarray(weight, float)
    share = weight / weight.sum()
    return tuple(float((np.arange(len(one)) + 0.5) @ one) for one in (share.sum(0), share.sum(1)))


def colored(overlay):
    """Where there is heat: the picture under it is grey."""
    return overlay.max(2).astype(int) - overlay.min(2) > 60


KINDS = ("cam", "refined_cam", "attention", "mean")


@pytest.fixture(scope="module", params=NETWORKS)
def predicted(request, tmp_path_factory):
    """The kind of network and the folder of predictions."""
    root = tmp_path_factory.mktemp("figures")
    (root / "in").mkdir()
    for name in FRAMES:
        picture, _, _ = photograph(name)
        options = {}
        if name == "turned":  # stored lying, with the EXIF orientation that turns it
            exif = Image.Exif()
            exif[0x0112] = 6
            picture, options = picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif}
        picture.save(root / "in" / f"{name}.png", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "load_model", lambda run: network(request.param))
        overlays = KINDS
        config = PredictConfig(input=str(root / "in"), out=str(root / "out"), overlays=overlays, workers=0)
        return request.param, predict(config)


@pytest.mark.parametrize("name", FRAMES)
def test_overlays_are_hot_where_the_lesion_is(predicted, name):
    network, folder = predicted
    size, stride, align_corners = NETWORKS[network]
    picture, (x, y), mask = photograph(name)
    saved = np.load(folder / "maps" / f"{name}.npz")
    geometry = Geometry(*(int(saved[f"geometry_{key}"]) for key in ("width", "height", "left", "top", "side", "size")))
    assert (geometry.width, geometry.height) == picture.size and saved["corners"] == size * align_corners
    pixel = geometry.side / size
    for kind in KINDS:
        heat = geometry.to_original(saved[kind], int(saved["corners"]))
        # the way there and back keeps the centroid; the network's picture has whole pixels
        assert centroid(heat if stride > 1 else np.where(heat > 0.5, heat, 0)) == pytest.approx((x, y), abs=pixel / 2)
        drawn = np.asarray(Image.open(folder / "overlays" / f"{name}_{kind}.jpg"), float)
        assert drawn.shape[:2] == picture.size[::-1]
        expected = overlay(np.asarray(picture), np.clip(heat, 0, 1))
        assert centroid(colored(drawn)) == pytest.approx(centroid(colored(expected)), abs=pixel / 4), kind
        if stride == 1:
            hot = colored(drawn)
            assert centroid(hot) == pytest.approx((x, y), abs=pixel / 2), kind
            inside = np.asarray(mask) > 0
            assert (hot & inside).sum() / (hot | inside).sum() > 1 - 2 * pixel / RADIUS, kind  # one pixel of rim


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", FRAMES)
def test_lesion_masks_lie_under_the_maps(tmp_path, name, kind):
    picture, _, mask = photograph(name)
    picture.save(tmp_path / "a.png")
    mask.save(tmp_path / "m.png")
    (tmp_path / "list.csv").write_text("path,label,patient,mask_spot\na.png,0,p,m.png\n")
    out = prepare(
        PrepareConfig(dataset="csv", root=str(tmp_path / "list.csv"), out=str(tmp_path / "d"), size=128, workers=1,
                      fractions=(1, 0, 0), progress=False)
    )  # fmt: skip
    records = Manifest.load(out).records
    (size, stride, _), (stub, info) = NETWORKS[kind], network(kind)
    collected = collect(stub, info, records)
    (shown,) = collected.gallery
    spot = shown.masks["spot"]
    for map_name, heat in shown.maps.items():
        seen = heat if stride > 1 else np.where(heat > 0.5, heat, 0)
        assert centroid(seen) == pytest.approx(centroid(spot), abs=0.5), map_name
    if stride > 1:
        return
    scores = collected.localization.summary(collected.localization.thresholds(), draws=0, seed=0).maps
    rim = size / records[0].geometry.side * RADIUS  # radius of the lesion in the prepared picture
    for map_name, score in scores.items():
        assert score["pointing"].value == 1 and score["iou"].value > 1 - 2 / rim, map_name
