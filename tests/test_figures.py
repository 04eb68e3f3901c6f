"""A lesion planted at known pixels of the photograph is hot at these pixels, whatever the frame around the fundus.

The network is a stub whose maps are how green the picture is, at full resolution: what remains is the way from the
photograph to the network and back, and that of the lesion masks.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ercn.config import DataConfig, ModelConfig, PredictConfig, PrepareConfig, TrainConfig
from ercn.data import Geometry, Manifest, prepare
from ercn.data.phantom import render_phantom
from ercn.models import ERCNOutput
from ercn.training import predict, prediction
from ercn.training.evaluation import collect

SIDE, SIZE, RADIUS = 320, 128, 16  # of the fundus in the photograph, of the network's picture, of the lesion
# width and height of the photograph, left and top of the fundus, the lesion in the fundus
FRAMES = {
    "wide": (480, 330, 80, 5, (100, 210)),
    "off_centre": (520, 360, 6, 34, (230, 90)),
    "cut_off": (400, 260, 44, -30, (150, 70)),
    "tall": (330, 500, 4, 150, (90, 150)),
    "notched": (460, 340, 60, 10, (240, 220)),
    "turned": (480, 330, 130, 5, (200, 110)),
}


class Green(torch.nn.Module):
    def forward(self, image):
        green = (image[:, 1:2] - image[:, 0:1]).clamp_min(0)
        cam = green.expand(-1, 4, -1, -1)
        logits = torch.full((len(image), 4), 9.0)
        attention = torch.log(green + 1e-6)
        return ERCNOutput(logits, logits, logits, cam, torch.cat([1 - green, cam], 1), green, attention)


INFO = {
    "config": TrainConfig(data=DataConfig(image_size=SIZE, workers=0), model=ModelConfig()),
    "class_names": list("abcde"),
    "image_size": SIZE,
    "prepared_size": SIZE,
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "normalize": "none",
    "temperature": 1.0,
    "manifest": "",
}


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


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    (root / "in").mkdir()
    for name in FRAMES:
        picture, _, _ = photograph(name)
        options = {}
        if name == "turned":  # stored lying, with the note that it is to be turned
            exif = Image.Exif()
            exif[0x0112] = 6
            picture, options = picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif}
        picture.save(root / "in" / f"{name}.png", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "load_model", lambda run: (Green(), INFO))
        overlays = ("cam", "refined_cam", "attention", "mean")
        config = PredictConfig(input=str(root / "in"), out=str(root / "out"), overlays=overlays, workers=0)
        return predict(config)


@pytest.mark.parametrize("name", FRAMES)
def test_overlays_are_hot_where_the_lesion_is(predicted, name):
    picture, (x, y), mask = photograph(name)
    saved = np.load(predicted / "maps" / f"{name}.npz")
    geometry = Geometry(*(int(saved[f"geometry_{key}"]) for key in ("width", "height", "left", "top", "side", "size")))
    assert (geometry.width, geometry.height) == picture.size
    element = geometry.side / SIZE
    for kind in ("cam", "refined_cam", "attention", "mean"):
        heat = geometry.to_original(saved[kind])
        # symmetric resampling of a symmetric spot keeps its centroid; JPEG and rounding are left
        assert centroid(np.where(heat > 0.5, heat, 0)) == pytest.approx((x, y), abs=element / 2), kind
        drawn = np.asarray(Image.open(predicted / "overlays" / f"{name}_{kind}.jpg"), float)
        assert drawn.shape[:2] == picture.size[::-1]
        hot = drawn.max(2) - drawn.min(2) > 60  # the picture is grey, and only heat has a colour
        assert centroid(hot) == pytest.approx((x, y), abs=element / 2), kind
        inside = np.asarray(mask) > 0
        assert (hot & inside).sum() / (hot | inside).sum() > 1 - 2 * element / RADIUS, kind  # one element of rim


@pytest.mark.parametrize("name", FRAMES)
def test_lesion_masks_lie_under_the_maps(tmp_path, name):
    picture, _, mask = photograph(name)
    picture.save(tmp_path / "a.png")
    mask.save(tmp_path / "m.png")
    (tmp_path / "list.csv").write_text("path,label,patient,mask_spot\na.png,0,p,m.png\n")
    out = prepare(
        PrepareConfig(dataset="csv", root=str(tmp_path / "list.csv"), out=str(tmp_path / "d"), size=SIZE, workers=1,
                      fractions=(1, 0, 0), progress=False)
    )  # fmt: skip
    records = Manifest.load(out).records
    device = torch.device("cpu")
    collected = collect(Green(), INFO, records, batch_size=1, workers=0, device=device, progress=False, title="")
    (shown,) = collected.gallery
    spot = shown.masks["spot"]
    for kind, heat in shown.maps.items():
        assert centroid(np.where(heat > 0.5, heat, 0)) == pytest.approx(centroid(spot), abs=0.5), kind
    scores = collected.localization.summary(collected.localization.thresholds(), draws=0, seed=0)["maps"]
    rim = SIZE / records[0].geometry.side * RADIUS  # radius of the lesion in the prepared picture
    for kind, score in scores.items():
        assert score["pointing"]["value"] == 1 and score["iou"]["value"] > 1 - 2 / rim, kind
