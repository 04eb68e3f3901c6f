"""Grades and full-resolution heat maps of any pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ercn._files import DISCLAIMER, check_empty, write_atomic, write_csv, write_json
from ercn._progress import with_progress
from ercn.checkpoint import RunInfo, load_model
from ercn.config import PredictConfig
from ercn.data import DataError, Geometry, locate_disc, read_picture
from ercn.data.dataset import to_tensor
from ercn.data.normalization import prepared
from ercn.evaluation.calibration import temper
from ercn.evaluation.infer import Views, forward, pick_device
from ercn.maps import NAMES, maps_of
from ercn.report.overlay import overlay, save_jpeg

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


class RawPictures(Dataset):
    """Photographs prepared for the network: disc found, cropped, resized, normalised as in training.

    An item is ``{"image": [3, S, S], "index": i, "geometry": Geometry}``, or a sentence where the file is unreadable.
    """

    def __init__(self, paths: list[Path], info: RunInfo, max_pixels: int) -> None:
        self.paths, self.info, self.max_pixels = paths, info, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            picture = read_picture(self.paths[index], max_pixels=self.max_pixels)
        except DataError as error:
            return str(error)
        geometry = locate_disc(picture, self.info.prepared_size)
        square = prepared(picture, geometry, self.info.normalize)
        image = to_tensor(square, self.info.image_size, self.info.mean, self.info.std)
        return {"image": image, "index": index, "geometry": geometry}


def gather(items: list[dict[str, Any] | str]) -> dict[str, Any]:
    """A batch of the readable items, and the sentences of the unreadable ones."""
    good = [item for item in items if not isinstance(item, str)]
    return {
        "image": torch.stack([item["image"] for item in good]) if good else None,
        "index": [item["index"] for item in good],
        "geometry": [item["geometry"] for item in good],
        "unreadable": [item for item in items if isinstance(item, str)],
    }


def predict(config: PredictConfig) -> Path:
    """Grades every picture of ``config.input`` and draws its heat maps; returns ``config.out``.

    The folder then holds predictions.csv (id, file, grade, p0, p1, …; one row a picture), overlays/<id>_<map>.jpg at
    the photograph's own resolution, maps/<id>.npz (float32 maps [h, w] on the fixed scale [0, 1], the crop's geometry
    and "corners", from which ``Geometry.to_original`` makes the full-resolution map) and predictions.json. Unreadable
    pictures are named and skipped; more than ``max_unreadable`` stop the run with a DataError that lists them.
    predictions.csv is written after every batch, so it keeps what was graded even if the process is killed.
    Raises ValueError when ``out`` is not empty: nothing is overwritten.
    """
    paths, ids = find_pictures(config.input)
    out = Path(config.out)
    check_empty(out)
    for name in config.overlays:
        if name not in NAMES:
            raise ValueError(f"overlays must be of {', '.join(NAMES)}; {name!r} is none")
    device = pick_device(config.accelerator)
    model, info = load_model(config.run)
    own = info.config.model
    made = maps_of(own)
    if absent := [name for name in config.overlays if name not in made]:
        raise ValueError(
            f"overlays has {', '.join(absent)}, which the model of {config.run} does not make (model.pool {own.pool}, "
            f"model.evidence {own.evidence}); it has {', '.join(made)}"
        )
    dataset = RawPictures(paths, info, config.max_pixels)
    loader = DataLoader(dataset, config.batch_size, num_workers=config.workers, collate_fn=gather)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []

    def readable(batches):
        for batch in batches:
            for sentence in batch["unreadable"]:
                skipped.append(sentence)
                print(f"unreadable, skipped: {sentence}", flush=True)
            if len(skipped) > config.max_unreadable:
                raise DataError(
                    f"{len(skipped)} pictures are unreadable, more than max_unreadable {config.max_unreadable}: "
                    + "; ".join(skipped)
                )
            yield batch if batch["index"] else None

    batches = readable(with_progress(loader, "predict", len(loader), config.progress))
    views = Views(config.scales, config.flip)
    corners = info.image_size if model.align_corners else 0
    for batch, probability, maps in forward(model, own, batches, device, views):
        probability = temper(probability, info.temperature)
        for i, (index, geometry) in enumerate(zip(batch["index"], batch["geometry"])):
            heats = {name: heat[i].numpy() for name, heat in maps.items()}
            _save_maps(out / "maps" / f"{ids[index]}.npz", heats, geometry, corners)
            _save_overlays(out / "overlays", ids[index], paths[index], heats, geometry, corners, config)
            rows.append(
                {"id": ids[index], "file": str(paths[index]), "grade": int(probability[i].argmax())}
                | {f"p{k}": f"{p:.6f}" for k, p in enumerate(probability[i])}
            )
        write_csv(out / "predictions.csv", rows)
    if not rows:
        raise DataError(f"no picture of {config.input} could be read: {'; '.join(skipped)}")
    write_json(
        out / "predictions.json",
        {
            "notice": DISCLAIMER,
            "run": config.run,
            "class_names": info.class_names,
            "manifest": info.manifest,
            "temperature": info.temperature,
            "maps": {"scale": [0, 1], "names": NAMES, **views._asdict()},
            "unreadable": skipped,
        },
    )
    print(f"{len(rows)} pictures graded, {len(skipped)} unreadable. {DISCLAIMER}", flush=True)
    return out


def find_pictures(source: str) -> tuple[list[Path], list[str]]:
    """The pictures (by suffix) of a folder and its subfolders, or the one file; sorted, with an id for each.

    The id is the path inside the folder without suffix, or with it where two pictures differ in the suffix only.
    """
    root = Path(source)
    if not source or not root.exists():
        raise FileNotFoundError(f"input {source or '(empty)'} does not exist; give a picture or a folder of pictures")
    if root.is_file():
        return [root], [root.stem]
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"input {root} holds no picture ({', '.join(sorted(SUFFIXES))})")
    bare = [str(p.relative_to(root).with_suffix("")) for p in paths]
    uses = Counter(bare)
    return paths, [str(p.relative_to(root)) if uses[b] > 1 else b for p, b in zip(paths, bare)]


def _save_maps(path: Path, heats: dict[str, np.ndarray], geometry: Geometry, corners: int) -> None:
    fields = {f"geometry_{name}": value for name, value in asdict(geometry).items()}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **heats, **fields, corners=corners)

    write_atomic(path, write)


def _save_overlays(
    folder: Path,
    name: str,
    path: Path,
    heats: dict[str, np.ndarray],
    geometry: Geometry,
    corners: int,
    config: PredictConfig,
) -> None:
    if not config.overlays:
        return
    picture = np.asarray(read_picture(path, max_pixels=config.max_pixels))
    for kind in config.overlays:
        heat = np.clip(geometry.to_original(heats[kind], corners), 0, 1)
        save_jpeg(folder / f"{name}_{kind}.jpg", overlay(picture, heat))
