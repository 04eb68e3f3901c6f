"""Tiny data sets with lesion masks in published layouts, made from phantoms of the CC0 photograph."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from _pictures import framed, write_csv
from PIL import Image

from ercn.data import DataError
from ercn.data.phantom import phantom_optic_disc, render_phantom

SIDE = 160


def fault(call, *arguments) -> str:
    with pytest.raises(DataError) as raised:
        call(*arguments)
    return str(raised.value)


@cache
def photograph(number: int, grade: int) -> tuple[Image.Image, dict[str, Image.Image]]:
    """A picture in a camera's frame, and the masks of its lesions and its optic disc as 0 or 255 ("L")."""
    disc, lesions = render_phantom(number, "left", grade, SIDE, 0)
    lesions["optic_disc"] = phantom_optic_disc(number, "left", SIDE, 0)
    return framed(disc, number), {kind: mask_in_frame(mask, number) for kind, mask in lesions.items()}


def mask_in_frame(mask: np.ndarray, number: int) -> Image.Image:
    picture = framed(np.repeat(mask[:, :, None], 3, 2).astype(np.uint8) * 255, number).convert("L")
    return picture.point(lambda value: 255 * (value > 127))


def save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=93) if path.suffix.lower() in (".jpg", ".jpeg") else picture.save(path)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_aptos_tree(root: Path, count: int = 10) -> None:
    names = [f"{7919 * n:012x}" for n in range(1, count + 1)]
    for n, name in enumerate(names):
        save(root / "train_images" / f"{name}.png", photograph(n, n % 5)[0])
    write_csv(root / "train.csv", "id_code,diagnosis", [(name, n % 5) for n, name in enumerate(names)])
    save(root / "test_images" / "ffff00001111.png", photograph(0, 0)[0])
    write_csv(root / "test.csv", "id_code", [("ffff00001111",)])


def write_messidor2_tree(root: Path, patients: int = 6) -> None:
    """Names and extensions as published: .png of one camera, .JPG on disk but .jpg in the CSV of the other."""
    pairs, rows = [], []
    for number in range(patients):
        old = number % 2
        names = [f"2005{number:04}_{43808 + 7 * side}_0100_PP" if old else f"IM{number:05}{side}" for side in (0, 1)]
        for side, name in enumerate(names):
            grade = (number + side) % 5
            save(root / "IMAGES" / (name + (".png" if old else ".JPG")), photograph(number, grade)[0])
            extension = ".png" if old else ".jpg"
            rows.append(
                (name + extension, "", "", 0) if (number, side) == (5, 1) else (name + extension, grade, grade // 3, 1)
            )
        pairs.append(";".join(name + (".png" if old else ".jpg") for name in names))
    write_csv(root / "messidor-2.csv", "left;right", [(pair,) for pair in pairs], newline="\r\n")
    header = "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"
    write_csv(root / "messidor_data.csv", header, rows)


IDRID_FOLDERS = {
    "microaneurysms": ("1. Microaneurysms", "MA"),
    "hemorrhages": ("2. Haemorrhages", "HE"),
    "hard_exudates": ("3. Hard Exudates", "EX"),
    "soft_exudates": ("4. Soft Exudates", "SE"),
    "optic_disc": ("5. Optic Disc", "OD"),
}
IDRID_PARTS = (("a. Training Set", "a. IDRiD_Disease Grading_Training Labels.csv"),
               ("b. Testing Set", "b. IDRiD_Disease Grading_Testing Labels.csv"))  # fmt: skip


def write_idrid_tree(root: Path, train: int = 10, test: int = 5) -> None:
    """Part B: names that come twice, a header with a blank and empty further columns."""
    for (part, labels), count, first in zip(IDRID_PARTS, (train, test), (0, train)):
        base = root / "B. Disease Grading"
        rows = []
        for n in range(count):
            save(base / "1. Original Images" / part / f"IDRiD_{n + 1:03}.jpg", photograph(first + n, n % 5)[0])
            rows.append((f"IDRiD_{n + 1:03}", n % 5, n % 3, "", "", ""))
        (base / "2. Groundtruths").mkdir(exist_ok=True)
        write_csv(base / "2. Groundtruths" / labels, "Image name,Retinopathy grade,Risk of macular edema ,,,", rows)


def write_idrid_segmentation_tree(root: Path, train: int = 4, test: int = 2) -> None:
    """Part A: masks as a palette of black and red, one of them with transparency, files of absent lesions missing."""
    for number in range(1, train + test + 1):
        part = IDRID_PARTS[number > train][0]
        picture, masks = photograph(number, 3)
        save(root / "A. Segmentation" / "1. Original Images" / part / f"IDRiD_{number:02}.jpg", picture)
        for kind, (folder, suffix) in IDRID_FOLDERS.items():
            where = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / part / folder
            where.mkdir(parents=True, exist_ok=True)
            if kind in masks:
                red = masks[kind].point(lambda value: value // 255).convert("P")
                red.putpalette([0, 0, 0, 255, 0, 0])
                if number == 2:
                    red = red.convert("RGBA")
                red.save(where / f"IDRiD_{number:02}_{suffix}.tif")
