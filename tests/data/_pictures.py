"""Small data sets in published layouts, made from phantoms of the CC0 photograph."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from ercn.data.phantom import phantom_grades, render_phantom

# A camera's frame around the fundus disc of diameter d: width, height, left and top of the disc, all in d
FRAMES = (
    (1.00, 1.00, 0.00, 0.00),
    (1.50, 1.02, 0.25, 0.01),
    (1.34, 0.88, 0.10, -0.06),  # cut off above and below
    (1.10, 1.30, 0.08, 0.17),
    (1.60, 1.10, 0.45, 0.03),  # off center
)


def framed(disc: np.ndarray, frame: int) -> Image.Image:
    """A phantom [S, S, 3] in one of ``FRAMES``."""
    d = disc.shape[0]
    width, height, left, top = (round(f * d) for f in FRAMES[frame % len(FRAMES)])
    picture = Image.new("RGB", (width, height), (2, 1, 3))
    picture.paste(Image.fromarray(disc), (left, top))
    return picture


def write_csv(path: Path, header: str, rows: list[tuple], newline: str = "\n", bom: bool = False) -> None:
    lines = [header] + [",".join(map(str, row)) for row in rows]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + newline.join([*lines, ""]).encode())


def write_eyepacs_tree(root: Path, patients: int = 12, seed: int = 0, test: bool = False) -> None:
    """EyePACS' published layout: trainLabels.csv and train/<patient>_<eye>.jpeg.

    Two eyes a patient, all five grades, phantom lesions, mixed sizes and frames. ``test`` adds as many patients again
    in retinopathy_solution.csv and test/, every second one Public.
    """
    parts = {"train": (patients, 10)} | ({"test": (patients, 10 + patients)} if test else {})
    for part, (count, first) in parts.items():
        (root / part).mkdir(parents=True)
        rows = []
        for number, grades in enumerate(phantom_grades(count, seed + (part == "test")), first):
            usage = ("Public", "Private")[number % 2]
            for eye, grade in zip(("left", "right"), grades):
                disc, _ = render_phantom(number, eye, grade, 176 + 24 * (number % 5), seed)
                name = f"{number}_{eye}"
                framed(disc, number).save(root / part / f"{name}.jpeg", quality=93, subsampling=0)
                rows.append((name, grade, usage) if part == "test" else (name, grade))
        if part == "test":
            write_csv(root / "retinopathy_solution.csv", "image,level,Usage", rows)
        else:
            write_csv(root / "trainLabels.csv", "image,level", rows)


def write_davis_tree(root: Path, patients: int = 10, seed: int = 0) -> None:
    """The Jichi set's layout: list.csv and <patient>_<n>_<L|R>.jpg; the two label columns differ in places."""
    root.mkdir(parents=True)
    names = ("ndr", "sdr", "ppdr", "pdr")
    rows = []
    for number in range(1, patients + 1):
        for n, (eye, side) in enumerate((("left", "L"), ("right", "R"), ("left", "L")), 1):
            grade = (number + (n == 3)) % 4
            disc, _ = render_phantom(10 * number + n, eye, (0, 2, 3, 4)[grade], 160 + 16 * n, seed)
            framed(disc, number + n).save(root / f"{number:03}_{n}_{side}.jpg", quality=93)
            rows.append((f"{number:03}_{n}_{side}.jpg", names[max(grade, number % 4)], names[grade]))
    write_csv(root / "list.csv", "Image,Davis_grading_of_concatenated_figures,Davis_grading_of_one_figure", rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
