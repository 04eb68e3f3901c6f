"""``ercn prepare``: turns a published data set, or the phantom, into a folder of square pictures with saved splits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from ercn._files import remove_temporary, replacing, write_text
from ercn._progress import with_progress
from ercn.config import PrepareConfig
from ercn.data.entries import OPTIC_DISC, Entry
from ercn.data.geometry import Geometry, locate_disc
from ercn.data.images import DataError, read_picture
from ercn.data.manifest import Record, mask_path, write_manifest
from ercn.data.masks import pixels_outside, prepared_mask, read_mask
from ercn.data.normalization import prepared
from ercn.data.phantom import LESIONS, phantom_optic_disc, render_phantom
from ercn.data.published import label_of, read_published
from ercn.data.splits import SPLITS, check_splits

logger = logging.getLogger(__name__)

STATISTICS_PICTURES = 2000
SHOWN = 20


class _Kept(NamedTuple):
    """Comment of a prepared picture. sizes: bytes of the photograph's file and of its masks, by file name."""

    geometry: Geometry
    sizes: dict[str, int]
    losses: dict[str, str]  # lesion to the note on what the prepared mask has lost


class _Outcome(NamedTuple):
    geometry: Geometry | None  # None if the picture could not be read
    reason: str
    losses: dict[str, str]  # as in _Kept


def prepare(config: PrepareConfig) -> Path:
    """Prepares a data set and returns its folder, ``config.out``; ``ercn.data.Manifest.load`` reads it.

    Photographs are cropped to the fundus disc (``locate_disc``), resized, normalized if that is wanted, and saved as
    JPEG of quality 95 without the original's metadata. Their lesion masks are saved beside them as PNG of 0 and 255
    (255 where half of a pixel is lesion). Phantoms are rendered and saved as PNG, with masks. Every picture is written
    under a temporary name and then renamed: called again, an interrupted run goes on where it stopped.

    Splits are by patient and stratified, or the publishers' own, and do not depend on which pictures can be read.
    Channel statistics are those of the train split, from at most 2,000 pictures, evenly chosen. prepare.json lists
    under "notes" what the reader left out or doubts, and what the prepared masks lost.

    Raises:
        DataError: faults in the labels, a grade without pictures, more than ``max_unreadable`` pictures missing or
            unreadable (each is named; fewer are skipped and listed in prepare.json), or ``out`` was prepared with other
            settings or from other photographs (of other sizes in bytes) or holds something else.
    """
    if not config.out:
        raise DataError("out must be the folder to write; got nothing")
    published = read_published(config)
    entries, class_names = published.entries, list(published.class_names)
    labels = config.root or config.dataset
    doubts = check_splits(_assigned(entries), class_names, labels)
    out = Path(config.out)
    settings = _settings(config, entries)
    _limit(_missing(entries, config), config)
    _check_sources(entries, config, published.folder)
    _claim(out, settings)

    phantom = config.dataset == "phantom"
    for kind in (*LESIONS, OPTIC_DISC) if phantom else {kind for entry in entries for kind in entry.masks}:
        (out / "masks" / kind).mkdir(parents=True, exist_ok=True)
    (out / "images").mkdir(exist_ok=True)

    make = partial(_phantom, config=config, out=out)
    if not phantom:
        make = partial(_photograph, config=config, out=out, folder=published.folder, mask_level=published.mask_level)
    records, skipped = [], []
    notes = dict(published.notes)
    with closing(_parallel(make, entries, config, "prepare")) as outcomes:
        for entry, outcome in zip(entries, outcomes):
            if outcome.geometry is None:
                skipped.append((entry, outcome.reason))
                _limit(skipped, config)
            else:
                records.append(_record(entry, outcome.geometry, config, out, published.folder))
                for kind, loss in outcome.losses.items():
                    notes.setdefault(loss, []).append(f"{entry.id} {kind}")
    if skipped:
        doubts = check_splits(_assigned(records), class_names, f"{labels}, less what cannot be read")
    for doubt in doubts:
        logger.warning("%s: %s", out, doubt)

    train = [record.image for record in records if record.split == "train"]
    chosen = train[:: -(-len(train) // STATISTICS_PICTURES)]
    moments = np.mean(list(_parallel(_moments, chosen, config, "statistics")), axis=0)  # [2, 3]
    about = {
        "settings": settings,
        "finished": True,
        "class_names": class_names,
        "counts": _counts(records, class_names),
        "mean": moments[0].tolist(),
        "std": np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1 / 255**2)).tolist(),
        "skipped": [{"id": e.id, "source": _relative(e.source, published.folder), "reason": why} for e, why in skipped],
        "notes": notes,
        "hash": write_manifest(out, records),
        "software": {name: version(name) for name in ("pillow", "numpy", "scipy", "scikit-image")},
    }
    _write_about(out, about)
    _report(out, about, len({record.patient for record in records}))
    return out


def _assigned(pictures: Sequence[Entry | Record]) -> list[tuple[str, str, int, str]]:
    return [(p.id, p.patient, p.grade, p.split) for p in pictures]


def _settings(config: PrepareConfig, entries: Sequence[Entry]) -> dict:
    """All settings that the prepared pictures and splits depend on, as JSON holds them."""
    names = ["dataset", "size", "fractions", "seed"]
    names += ["patients", "difficulty"] if config.dataset == "phantom" else ["max_pixels"]
    names += ["normalize"] if config.normalize != "none" else []
    settings = {name: getattr(config, name) for name in names}
    settings |= {"label": label_of(config)} if label_of(config) else {}
    lines = "".join("\t".join(map(str, (e.id, e.patient, e.grade, e.split, *sorted(e.masks)))) + "\n" for e in entries)
    settings["labels_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    return json.loads(json.dumps(settings))


def _claim(out: Path, settings: dict) -> None:
    """Marks ``out`` as being prepared with these settings; DataError where it holds anything else."""
    about = out / "prepare.json"
    if about.exists():
        try:
            before = json.loads(about.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{about}: not a file that `ercn prepare` wrote; choose another out") from None
        if before != settings:
            names = [name for name in settings if name != "labels_sha256" and before.get(name) != settings[name]]
            other = ", ".join(f"{name}={before.get(name)!r} (now {settings[name]!r})" for name in names)
            other = other or "the labels or the list of pictures were others"
            raise DataError(f"{out} was prepared with other settings: {other}; choose another out")
    elif out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; out must be a folder")
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"{out} is not empty and was not written by `ercn prepare`; choose another out")
    out.mkdir(parents=True, exist_ok=True)
    remove_temporary(out)
    _write_about(out, {"settings": settings, "finished": False})


def _write_about(out: Path, about: dict) -> None:
    write_text(out / "prepare.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _missing(entries: Sequence[Entry], config: PrepareConfig) -> list[tuple[Entry, str]]:
    """Photographs that are missing and were not prepared before."""
    if config.dataset == "phantom":
        return []
    lost = [e for e in entries if not e.source.is_file() and not (Path(config.out) / _image_path(e, config)).is_file()]
    return [(entry, "no such file") for entry in lost]


def _check_sources(entries: Sequence[Entry], config: PrepareConfig, folder: Path) -> None:
    """DataError where the pictures in ``out`` were made from other photographs or masks; missing ones are no fault."""
    if config.dataset == "phantom":
        return
    others = []
    for entry in entries:
        kept = _kept(Path(config.out) / _image_path(entry, config))
        for path in _files(entry) if kept else ():
            before = kept.sizes.get(_relative(path, folder))
            if path.is_file() and (now := path.stat().st_size) != before:
                others.append(f"{_image_path(entry, config)} from {before} bytes, {path} has {now}")
    if others:
        more = f"; and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise DataError(
            f"{config.out} was prepared from other photographs: {'; '.join(others[:SHOWN])}{more}; choose another out, "
            "or delete these prepared pictures to have them made again"
        )


def _limit(skipped: Sequence[tuple[Entry, str]], config: PrepareConfig) -> None:
    if len(skipped) > config.max_unreadable:
        lines = "; ".join(f"{entry.source}: {reason}" for entry, reason in skipped[:SHOWN])
        more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        raise DataError(
            f"{len(skipped)} pictures cannot be read, max_unreadable is {config.max_unreadable}: {lines}{more}"
        )


def _parallel(work: Callable, items: Sequence, config: PrepareConfig, title: str) -> Iterator:
    """Results of ``work`` in the order of ``items``, from ``config.workers`` processes, with a progress bar."""
    bar = partial(with_progress, title=title, total=len(items), wanted=config.progress)
    if config.workers < 2:
        yield from bar(map(work, items))
        return
    pool = ProcessPoolExecutor(config.workers)
    try:
        yield from bar(pool.map(work, items, chunksize=4))
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed (out of memory?); run again, with fewer workers: it goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _image_path(entry: Entry, config: PrepareConfig) -> str:
    return f"images/{entry.id}.png" if config.dataset == "phantom" else f"images/{entry.id}.jpg"


def _kept(path: Path) -> _Kept | None:
    """What ``_comment`` stored in a prepared picture, or None if there is no such picture."""
    try:
        with Image.open(path) as picture:
            comment = json.loads(picture.info["comment"])
        return _Kept(Geometry(**comment["geometry"]), comment["sizes"], comment["losses"])
    except (OSError, KeyError, ValueError, TypeError):  # missing, or without our comment: it is made again
        return None


def _comment(geometry: Geometry, sizes: dict[str, int], losses: dict[str, str]) -> str:
    return json.dumps({"geometry": asdict(geometry), "sizes": sizes, "losses": losses})


def _files(entry: Entry) -> list[Path]:
    return [entry.source, *entry.masks.values()]


def _photograph(entry: Entry, config: PrepareConfig, out: Path, folder: Path, mask_level: int) -> _Outcome:
    path = out / _image_path(entry, config)
    if kept := _kept(path):
        return _Outcome(kept.geometry, "", kept.losses)
    try:
        picture = read_picture(entry.source, max_pixels=config.max_pixels)
        masks = {
            kind: read_mask(mask, picture.size, mask_level, max_pixels=config.max_pixels)
            for kind, mask in entry.masks.items()
        }
    except DataError as error:
        reason = str(error).removeprefix(f"{entry.source}: ").replace(f"{folder}{os.sep}", "")  # in a mask's path
        return _Outcome(None, reason, {})
    geometry = locate_disc(picture, config.size)
    losses = {kind: loss for kind, mask in masks.items() if (loss := _write_mask(mask, kind, entry, geometry, out))}
    sizes = {_relative(file, folder): file.stat().st_size for file in _files(entry)}
    comment = _comment(geometry, sizes, losses)
    with replacing(path) as temporary:  # last: where the picture is, its masks are
        prepared(picture, geometry, config.normalize).save(temporary, quality=95, subsampling="4:4:4", comment=comment)
    return _Outcome(geometry, "", losses)


def _write_mask(mask: np.ndarray, kind: str, entry: Entry, geometry: Geometry, out: Path) -> str:
    """Writes a photograph's mask, if it is not empty, and returns a note on what it lost, or ""."""
    path = out / mask_path(kind, entry.id)
    small = prepared_mask(mask, geometry)
    path.unlink(missing_ok=True)  # of a photograph that was here before
    if small.getbbox():
        with replacing(path) as temporary:
            small.save(temporary)
    if pixels_outside(mask, geometry):
        return "mask reaches outside of the crop"
    return "mask is empty at this size" if mask.any() and not small.getbbox() else ""


def _phantom(entry: Entry, config: PrepareConfig, out: Path) -> _Outcome:
    path = out / _image_path(entry, config)
    if kept := _kept(path):
        return _Outcome(kept.geometry, "", {})
    size = config.size
    patient, eye = entry.patient[1:], entry.id.rpartition("_")[2]
    picture, masks = render_phantom(int(patient), eye, entry.grade, size, config.seed, config.difficulty)
    masks[OPTIC_DISC] = phantom_optic_disc(int(patient), eye, size, config.seed)
    for kind, mask in masks.items():
        with replacing(out / mask_path(kind, entry.id)) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)
    geometry = Geometry(size, size, 0, 0, size, size)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", _comment(geometry, {}, {}))
    image = prepared(Image.fromarray(picture), geometry, config.normalize)
    with replacing(path) as temporary:  # last: where the picture is, its masks are
        image.save(temporary, pnginfo=info, compress_level=4)
    return _Outcome(geometry, "", {})


def _record(entry: Entry, geometry: Geometry, config: PrepareConfig, out: Path, folder: Path) -> Record:
    kinds = LESIONS if config.dataset == "phantom" else [kind for kind in entry.masks if kind != OPTIC_DISC]
    masks = {kind: path for kind in kinds if (path := out / mask_path(kind, entry.id)).exists()}
    disc = out / mask_path(OPTIC_DISC, entry.id)
    return Record(
        entry.id,
        out / _image_path(entry, config),
        entry.grade,
        entry.patient,
        entry.split,
        masks,
        geometry,
        disc if disc.exists() else None,
        "" if config.dataset == "phantom" else _relative(entry.source, folder),
    )


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _moments(path: Path) -> np.ndarray:
    """Means of x and x² over one picture's pixels, x in 0 … 1: float64 [2, 3]."""
    with Image.open(path) as picture:
        x = np.asarray(picture, float).reshape(-1, 3) / 255
    return np.stack([x.mean(0), (x * x).mean(0)])


def _counts(records: Sequence[Record], class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Pictures by split and name of the grade."""
    count = Counter((record.split, record.grade) for record in records)
    names = dict(enumerate(class_names)) or {None: "no grade"}
    return {split: {name: count[split, grade] for grade, name in names.items()} for split in SPLITS}


def _report(out: Path, about: dict, patients: int) -> None:
    counts, size = about["counts"], about["settings"]["size"]
    names = list(counts["train"])
    pictures = sum(sum(count.values()) for count in counts.values())
    widths = [max(len(name), 6) for name in names]
    print(f"{about['settings']['dataset']}: {pictures} pictures of {patients} patients, {size} x {size}, in {out}")
    print(" " * 6 + "  ".join(f"{name:>{w}}" for name, w in zip(names, widths)) + "     all")
    for split, count in counts.items():
        cells = "  ".join(f"{count[name]:>{w}}" for name, w in zip(names, widths))
        print(f"{split:<6}{cells}  {sum(count.values()):>6}")
    for split, fraction in zip(SPLITS, about["settings"]["fractions"]):
        if fraction > 0 and not sum(counts[split].values()):
            print(f"no picture in the {split} split, although its fraction is {fraction:g}: there are too few patients")
    for one in about["skipped"]:
        print(f"skipped {one['source']}: {one['reason']}", file=sys.stderr)
    for sentence, files in about["notes"].items():
        more = f", and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        print(f"{sentence}: {len(files)}: {', '.join(files[:SHOWN])}{more}", file=sys.stderr)
