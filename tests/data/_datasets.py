"""Tiny data sets with lesion masks in published layouts, made from phantoms of the CC0 photograph."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from _pictures import framed, write_csv
from PIL import Image, ImageFilter

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
    """Part B: names that occur in both splits, a header with a blank and empty further columns."""
    for (part, labels), count, first in zip(IDRID_PARTS, (train, test), (0, train)):
        base = root / "B. Disease Grading"
        rows = []
        for n in range(count):
            save(base / "1. Original Images" / part / f"IDRiD_{n + 1:03}.jpg", photograph(first + n, n % 5)[0])
            rows.append((f"IDRiD_{n + 1:03}", n % 5, n % 3, "", "", ""))
        (base / "2. Groundtruths").mkdir(exist_ok=True)
        write_csv(base / "2. Groundtruths" / labels, "Image name,Retinopathy grade,Risk of macular edema ,,,", rows)


IDRID_EYES = (50, 107, 123, 142, 155, 159)  # which have all lesions of the set


def write_idrid_segmentation_tree(root: Path, train: int = 4, test: int = 2) -> None:
    """Part A: masks as a palette of black and red, one of them with transparency, files of absent lesions missing."""
    for number in range(1, train + test + 1):
        part = IDRID_PARTS[number > train][0]
        picture, masks = photograph(IDRID_EYES[number - 1], 3)
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


DDR_PARTS = {"train": "label", "valid": "segmentation label", "test": "label"}
DDR_FOLDERS = {"hard_exudates": "EX", "hemorrhages": "HE", "microaneurysms": "MA", "soft_exudates": "SE"}


def write_ddr_tree(root: Path, count: int = 5) -> None:
    """One ungradable picture in each split."""
    for place, part in enumerate(DDR_PARTS):
        lines = []
        for n in range(count + 1):
            name = f"007-{100 * place + n:04}-{100 * n:03}.jpg"
            save(root / "DR_grading" / part / name, photograph(place + n, min(n, 4))[0])
            lines.append(f"{name} {5 if n == count else n % 5}\n")
        (root / "DR_grading" / f"{part}.txt").write_text("".join(lines))


def write_ddr_segmentation_tree(root: Path, count: int = 2) -> None:
    """A mask of every lesion for every picture, some of them empty; another folder name in valid."""
    for place, (part, label) in enumerate(DDR_PARTS.items()):
        for n in range(count):
            name = f"007-{10 * place + n:04}-200"
            picture, masks = photograph(10 * place + n, 3)
            save(root / "lesion_segmentation" / part / "image" / f"{name}.jpg", picture)
            for kind, folder in DDR_FOLDERS.items():
                mask = masks.get(kind, Image.new("L", picture.size))
                save(root / "lesion_segmentation" / part / label / folder / f"{name}.tif", mask)


FGADR_FOLDERS = {
    "microaneurysms": "Microaneurysms_Masks",
    "hemorrhages": "Hemohedge_Masks",
    "hard_exudates": "HardExudate_Masks",
    "soft_exudates": "SoftExudate_Masks",
    "irma": "IRMA_Masks",
    "neovascularization": "Neovascularization_Masks",
}


def write_fgadr_tree(root: Path, count: int = 10) -> None:
    """Four masks for every picture, the two rare ones where there is such a lesion; smoothed edges, some as RGB."""
    part = root / "Seg-set"
    for folder in FGADR_FOLDERS.values():
        (part / folder).mkdir(parents=True)
    rows = []
    for n in range(count):
        name, (picture, masks) = f"{n:04}_{1 + n % 3}.png", photograph(n, n % 5)
        save(part / "Original_Images" / name, picture)
        for kind, folder in FGADR_FOLDERS.items():
            if kind in masks or kind not in ("irma", "neovascularization"):
                mask = masks.get(kind, Image.new("L", picture.size)).filter(ImageFilter.BoxBlur(1))
                save(part / folder / name, mask.convert("RGB") if n % 2 else mask)
        rows.append(f"{name},{n % 5}\n")
    (part / "DR_Seg_Grading_Label.csv").write_text("".join(rows))


RLDR_FILES = {
    "microaneurysms": "microaneurysm",
    "hemorrhages": "retinal_hemorrhage",
    "hard_exudates": "hard_exudate",
    "soft_exudates": "cotton_wool_spots",
    "preretinal_hemorrhage": "preretinal_hemorrhage",
    "neovascularization": "neovascularization",
}


def write_rldr_tree(root: Path, patients: int = 10, first: int = 10) -> None:
    """Square pictures, named as in EyePACS; no folder of masks where there is no lesion; 127 in a corner of some."""
    rows = []
    (root / "lesion_segs_896x896").mkdir(parents=True)
    for number in range(first, first + patients):
        for eye in ("left", "right") if number % 2 else ("left",):
            name, grade = f"{number}_{eye}", number % 5
            picture, masks = photograph(5 * number, grade)
            save(root / "images_896x896" / f"{name}.jpg", picture)
            for kind, file in RLDR_FILES.items():
                if kind in masks:
                    mask = masks[kind].copy()
                    mask.paste(127, (0, 0, 20, 20))
                    save(root / "lesion_segs_896x896" / name / f"{file}.png", mask)
            rows.append((name, (grade + 1) % 5, grade))
    write_csv(root / "dr_grades.csv", "image id,kaggle label,our label", rows)


def write_csv_list(root: Path, patients: int = 6) -> Path:
    rows = []
    for number in range(patients):
        for eye in ("l", "r"):
            picture, masks = photograph(number, number % 3)
            source, mask = f"clinic/{number}/{eye}.jpg", f"masks/{number}{eye}.png"
            save(root / source, picture)
            if "hemorrhages" in masks:
                save(root / mask, masks["hemorrhages"])
            rows.append((source, number % 3, f"p{number}", mask if "hemorrhages" in masks else "", number % 2))
    write_csv(root / "mine.csv", "path,label,patient,mask_hemorrhages,smoker", rows)
    return root / "mine.csv"
