"""``ercn prepare``: a published data set, or the phantom, to a folder of small square pictures with saved splits."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from ercn._files import remove_temporary, replacing, write_text
from ercn._progress import with_progress
from ercn.config import PrepareConfig
from ercn.data import davis, eyepacs
from ercn.data.entries import Entry
from ercn.data.geometry import Geometry, locate_disc
from ercn.data.images import DataError, read_picture
from ercn.data.manifest import Record, mask_path, write_manifest
from ercn.data.phantom import LESIONS, phantom_grades, phantom_optic_disc, render_phantom
from ercn.data.splits import SPLITS, check_splits, split_patients

logger = logging.getLogger(__name__)

STATISTICS_PICTURES = 2000
SHOWN = 20


class _Kept(NamedTuple):
    geometry: Geometry
    source_bytes: int | None  # size of the photograph's file; None for a phantom


class _Outcome(NamedTuple):
    geometry: Geometry | None  # None if the picture could not be read
    reason: str = ""


def prepare(config: PrepareConfig) -> Path:
    """Prepares a data set and returns its folder, ``config.out``; ``ercn.data.Manifest.load`` reads it.

    Photographs are cropped to the fundus disc (``locate_disc``), resized and saved as JPEG of quality 95 without
    metadata of the original; phantoms are rendered and saved as PNG with a mask for each kind of lesion. Every picture
    is written under a temporary name and then renamed, so an interrupted run goes on where it stopped when it is
    called again. Splits are by patient and stratified, or the publishers' own, and do not depend on which pictures can
    be read. Channel statistics are those of the train split, from at most 2,000 pictures, evenly chosen.

    Raises:
        DataError: faults in the labels, a grade without pictures, more than ``max_unreadable`` pictures missing or
            unreadable (each is named; fewer are skipped and listed in prepare.json), or ``out`` was prepared with other
            settings or from other photographs (told by their sizes in bytes) or holds something else.
    """
    if not config.out:
        raise DataError("out must be the folder to write; got nothing")
    entries, class_names = _entries(config)
    labels = config.root or config.dataset
    notes = check_splits(_assigned(entries), class_names, labels)
    out = Path(config.out)
    settings = _settings(config, entries)
    _limit(_missing(entries, config), config)
    _check_sources(entries, config)
    _claim(out, settings)

    for kind in (*LESIONS, "optic_disc") if config.dataset == "phantom" else ():
        (out / "masks" / kind).mkdir(parents=True, exist_ok=True)
    (out / "images").mkdir(exist_ok=True)

    make = partial(_phantom if config.dataset == "phantom" else _photograph, config=config, out=out)
    records, skipped = [], []
    with closing(_parallel(make, entries, config, "prepare")) as outcomes:
        for entry, outcome in zip(entries, outcomes):
            if outcome.geometry is None:
                skipped.append((entry, outcome.reason))
                _limit(skipped, config)
            else:
                records.append(_record(entry, outcome.geometry, config, out))
    if skipped:
        notes = check_splits(_assigned(records), class_names, f"{labels}, less what cannot be read")
    for note in notes:
        logger.warning("%s: %s", out, note)

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
        "skipped": [{"id": e.id, "source": _relative(e, config), "reason": reason} for e, reason in skipped],
        "hash": write_manifest(out, records),
        "software": {name: version(name) for name in ("pillow", "numpy", "scipy", "scikit-image")},
    }
    _write_about(out, about)
    _report(out, about, len({record.patient for record in records}))
    return out


def _entries(config: PrepareConfig) -> tuple[list[Entry], list[str]]:
    """All labeled pictures, each with its split, and the names of the grades."""
    if config.dataset == "phantom":
        entries, names = _phantom_entries(config), eyepacs.CLASS_NAMES
    elif config.dataset == "eyepacs":
        entries, names = eyepacs.read_eyepacs(config.root), eyepacs.CLASS_NAMES
    elif config.dataset == "davis":
        entries, names = davis.read_davis(config.root, config.label), davis.CLASS_NAMES
    else:
        raise DataError(f"dataset must be 'phantom', 'eyepacs' or 'davis'; got {config.dataset!r}")
    grades = defaultdict(list)
    for entry in entries:
        grades[entry.patient].append(entry.grade)
    split = split_patients(grades, config.fractions, config.seed)
    return [entry if entry.split else replace(entry, split=split[entry.patient]) for entry in entries], list(names)


def _phantom_entries(config: PrepareConfig) -> list[Entry]:
    digits = max(4, len(str(config.patients)))
    return [
        Entry(f"p{number:0{digits}}_{eye}", Path(), grade, f"p{number:0{digits}}")
        for number, grades in enumerate(phantom_grades(config.patients, config.seed), 1)
        for eye, grade in zip(("left", "right"), grades)
    ]


def _assigned(pictures: Sequence[Entry | Record]) -> list[tuple[str, str, int, str]]:
    return [(p.id, p.patient, p.grade, p.split) for p in pictures]


def _settings(config: PrepareConfig, entries: Sequence[Entry]) -> dict:
    """All that the prepared pictures and splits depend on, as JSON holds it."""
    names = ["dataset", "size", "fractions", "seed"]
    names += ["patients"] if config.dataset == "phantom" else ["max_pixels"]
    names += ["label"] if config.dataset == "davis" else []
    settings = {name: getattr(config, name) for name in names}
    lines = "".join(f"{id}\t{patient}\t{grade}\t{split}\n" for id, patient, grade, split in _assigned(entries))
    settings["labels_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    return json.loads(json.dumps(settings))


def _claim(out: Path, settings: dict) -> None:
    """Marks ``out`` as being prepared with these settings; refuses a folder that is anything else."""
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
    """Photographs that are not there and not prepared yet."""
    if config.dataset == "phantom":
        return []
    lost = [e for e in entries if not e.source.is_file() and not (Path(config.out) / _image_path(e, config)).is_file()]
    return [(entry, "no such file") for entry in lost]


def _check_sources(entries: Sequence[Entry], config: PrepareConfig) -> None:
    """Refuses photographs other than those the pictures in ``out`` were made from; ones that are gone are no fault."""
    if config.dataset == "phantom":
        return
    others = []
    for entry in entries:
        kept = _kept(Path(config.out) / _image_path(entry, config))
        if kept and entry.source.is_file() and (now := entry.source.stat().st_size) != kept.source_bytes:
            others.append(f"{_image_path(entry, config)} from {kept.source_bytes} bytes, {entry.source} has {now}")
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


def _comment(geometry: Geometry, source_bytes: int | None) -> str:
    return json.dumps({"geometry": asdict(geometry), "source_bytes": source_bytes})


def _kept(path: Path) -> _Kept | None:
    """What ``_comment`` stored in a prepared picture, or None if there is no such picture."""
    try:
        with Image.open(path) as picture:
            comment = json.loads(picture.info["comment"])
        return _Kept(Geometry(**comment["geometry"]), comment["source_bytes"])
    except (OSError, KeyError, ValueError, TypeError):  # missing, or not one of ours: it is made again
        return None


def _photograph(entry: Entry, config: PrepareConfig, out: Path) -> _Outcome:
    path = out / _image_path(entry, config)
    if kept := _kept(path):
        return _Outcome(kept.geometry)
    try:
        picture = read_picture(entry.source, max_pixels=config.max_pixels)
    except DataError as error:
        return _Outcome(None, str(error).removeprefix(f"{entry.source}: "))
    geometry = locate_disc(picture, config.size)
    comment = _comment(geometry, entry.source.stat().st_size)
    with replacing(path) as temporary:
        geometry.crop(picture).save(temporary, quality=95, subsampling="4:4:4", comment=comment)
    return _Outcome(geometry)


def _phantom(entry: Entry, config: PrepareConfig, out: Path) -> _Outcome:
    path = out / _image_path(entry, config)
    if kept := _kept(path):
        return _Outcome(kept.geometry)
    size = config.size
    patient, eye = entry.patient[1:], entry.id.rpartition("_")[2]
    picture, masks = render_phantom(int(patient), eye, entry.grade, size, config.seed)
    masks["optic_disc"] = phantom_optic_disc(int(patient), eye, size, config.seed)
    for kind, mask in masks.items():
        with replacing(out / mask_path(kind, entry.id)) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)
    geometry = Geometry(size, size, 0, 0, size, size)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", _comment(geometry, None))
    with replacing(path) as temporary:  # last: where the picture is, its masks are
        Image.fromarray(picture).save(temporary, pnginfo=info, compress_level=4)
    return _Outcome(geometry)


def _record(entry: Entry, geometry: Geometry, config: PrepareConfig, out: Path) -> Record:
    masks, disc = {}, None
    if config.dataset == "phantom":
        paths = {kind: out / mask_path(kind, entry.id) for kind in LESIONS}
        masks = {kind: path for kind, path in paths.items() if path.exists()}
        disc = out / mask_path("optic_disc", entry.id)
    image = out / _image_path(entry, config)
    return Record(
        entry.id, image, entry.grade, entry.patient, entry.split, masks, geometry, disc, _relative(entry, config)
    )


def _relative(entry: Entry, config: PrepareConfig) -> str:
    return "" if config.dataset == "phantom" else entry.source.relative_to(config.root).as_posix()


def _moments(path: Path) -> np.ndarray:
    """Means of x and x² over one picture's pixels, x in 0 … 1: float64 [2, 3]."""
    with Image.open(path) as picture:
        x = np.asarray(picture, float).reshape(-1, 3) / 255
    return np.stack([x.mean(0), (x * x).mean(0)])


def _counts(records: Sequence[Record], class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    count = Counter((record.split, record.grade) for record in records)
    return {split: {name: count[split, grade] for grade, name in enumerate(class_names)} for split in SPLITS}


def _report(out: Path, about: dict, patients: int) -> None:
    names, counts, size = about["class_names"], about["counts"], about["settings"]["size"]
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
