"""Evaluation of a trained run on one split: JSON, table, predictions and the refreshed report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ercn._progress import with_progress
from ercn.config import EvaluateConfig
from ercn.data import Manifest, Record
from ercn.models import ERCN
from ercn.training import metrics
from ercn.training.checkpoint import load_model
from ercn.training.files import DISCLAIMER, write_csv, write_json
from ercn.training.infer import forward, pick_device
from ercn.training.localization import Localization
from ercn.training.maps import enlarge
from ercn.training.overlay import overlay, save_jpeg
from ercn.training.pictures import load_manifest, make_loader, need_split, picture_dataset
from ercn.training.report import write_report
from ercn.training.table import print_metrics

GALLERY = 10  # pictures with overlays in the report


@dataclass
class Collected:
    """What the model says about one split; rows in the order of the pictures that could be read."""

    records: list[Record] = field(default_factory=list)
    probability: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    truth: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    localization: Localization = field(default_factory=Localization)
    gallery: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def patients(self) -> list[str]:
        return [record.patient for record in self.records]


def collect(
    model: ERCN,
    info: dict[str, Any],
    records: Sequence[Record],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: bool,
    title: str,
) -> Collected:
    """Runs the model over the pictures, each once, and keeps probabilities, map statistics and the gallery."""
    config = info["config"]
    dataset = picture_dataset(records, info["mean"], info["std"], config.data, seed=0, augment=False, with_masks=True)
    loader = make_loader(dataset, batch_size, workers)
    shown = set(gallery_choice(records))
    result, parts, seen = Collected(), [], []
    batches = with_progress(loader, title, len(loader), progress)
    for batch, probability, maps in forward(model, config.model, batches, device):
        full = {name: enlarge(heat, config.data.image_size).numpy() for name, heat in maps.items()}
        parts.append(probability)
        for i, index in enumerate(batch["index"].tolist()):
            record, lesion = records[index], batch["lesion"][i].numpy().astype(bool)
            heats = {name: heat[i] for name, heat in full.items()}
            seen.append(index)
            result.localization.add(heats, lesion, record.patient)
            if index in shown:
                picture = _picture(batch["image"][i], info)
                result.gallery.append({"row": len(seen) - 1, "picture": picture, "maps": heats, "lesion": lesion})
    result.records = [records[i] for i in seen]
    read = set(seen)
    result.unreadable = [r.id for i, r in enumerate(records) if i not in read]
    if parts:
        result.probability = np.concatenate(parts)
        grade = np.array([r.grade for r in result.records])
        result.truth = metrics.classes_of(grade, config.model.targets)
    return result


def choose_thresholds(collected: Collected) -> dict[str, Any]:
    """Decision thresholds from the validation split: referable DR by Youden's J, each map by its best pooled IoU."""
    score = metrics.referable(collected.probability)
    positive = metrics.is_referable(collected.truth, collected.probability.shape[1])
    return {
        "referable": metrics.youden_threshold(score, positive),
        "maps": collected.localization.best_thresholds(),
    }


def write_evaluation(
    run: Path, name: str, collected: Collected, info: dict[str, Any], manifest: Manifest, *, draws: int, seed: int
) -> dict[str, Any]:
    """Writes ``evaluation/name.json``, ``name_predictions.csv`` and ``name_gallery/`` into the run folder."""
    thresholds = info["thresholds"]
    folder = run / "evaluation"
    result = {
        "name": name,
        "notice": DISCLAIMER,
        "dataset": manifest.dataset,
        "manifest": manifest.hash,
        "class_names": info["class_names"],
        "threshold": thresholds["referable"],
        "bootstrap": {"draws": draws, "seed": seed, "unit": "patient", "interval": "95 % percentile"},
        **metrics.grading(
            collected.probability,
            collected.truth,
            collected.patients,
            threshold=thresholds["referable"],
            draws=draws,
            seed=seed,
        ),
        "localization": collected.localization.summary(thresholds["maps"], draws=draws, seed=seed),
        "unreadable": collected.unreadable,
        "gallery": _write_gallery(folder / f"{name}_gallery", collected, info["class_names"]),
    }
    predicted = collected.probability.argmax(1)
    write_csv(
        folder / f"{name}_predictions.csv",
        (
            {"id": record.id, "grade": record.grade, "class": int(collected.truth[i]), "predicted": int(predicted[i])}
            | {f"p{k}": f"{p:.6f}" for k, p in enumerate(collected.probability[i])}
            for i, record in enumerate(collected.records)
        ),
    )
    write_json(folder / f"{name}.json", result)
    return result


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of the run's exported model on one split of its data set or, with ``config.data``, of another.

    Writes ``evaluation/<name>.json``, its predictions and gallery into the run folder, refreshes report.html, prints
    a table and returns what the JSON holds. <name> is the split, with the data set's name before it where it is
    another one. Decision thresholds come from the validation at the end of the training. Raises ValueError, DataError
    or FileNotFoundError.
    """
    run = Path(config.run)
    model, info = load_model(run)
    root = config.data or info["config"].data.root
    manifest = load_manifest(root)
    own = manifest.hash == info["manifest"]
    if not own and config.data is None:
        raise ValueError(
            f"{root} has changed since the training (its manifest has another hash), so its splits may leak; "
            f"to evaluate on it as another data set, name it: --data {root}"
        )
    check_classes(info, manifest)
    check_normalization(info, manifest)
    records = need_split(manifest, config.split, root)
    collected = collect(
        model,
        info,
        records,
        batch_size=config.batch_size,
        workers=config.workers,
        device=pick_device(config.accelerator),
        progress=config.progress,
        title=f"evaluate {config.split}",
    )
    name = config.split if own else f"{manifest.dataset}-{config.split}"
    result = write_evaluation(run, name, collected, info, manifest, draws=config.bootstrap, seed=config.seed)
    print_metrics(result)
    write_report(run)
    print(run / "report.html", flush=True)
    return result


def check_classes(info: dict[str, Any], manifest: Manifest) -> None:
    """Raises ValueError where the data set has other grades than the model."""
    grades = info["config"].model.num_grades
    if not manifest.class_names:
        raise ValueError(f"data set {manifest.dataset} has no grades; training and evaluation need them")
    if len(manifest.class_names) != grades:
        raise ValueError(
            f"the model grades {grades} classes (model.num_grades), but data set {manifest.dataset} has "
            f"{len(manifest.class_names)}: {', '.join(manifest.class_names)}"
        )


def check_normalization(info: dict[str, Any], manifest: Manifest) -> None:
    """Raises ValueError where the pictures were not prepared like those of the training."""
    if manifest.normalize != info["normalize"]:
        raise ValueError(
            f"the model was trained on pictures of `ercn prepare --normalize {info['normalize']}`, but {manifest.root} "
            f"was prepared with {manifest.normalize}; prepare it again in a new folder"
        )


def gallery_choice(records: Sequence[Record]) -> list[int]:
    """Indices of the first pictures of every grade in turn, those with lesion masks first, at most ``GALLERY``."""
    queues: dict[int, list[int]] = {}
    for i in sorted(range(len(records)), key=lambda i: not records[i].masks):
        queues.setdefault(records[i].grade, []).append(i)
    rounds = max((len(q) for q in queues.values()), default=0)
    return [queues[g][r] for r in range(rounds) for g in sorted(queues, reverse=True) if r < len(queues[g])][:GALLERY]


def _picture(image: torch.Tensor, info: dict[str, Any]) -> np.ndarray:
    """Undoes the normalisation: [3, S, S] -> [S, S, 3] uint8."""
    mean, std = (torch.tensor(info[name]).view(3, 1, 1) for name in ("mean", "std"))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _write_gallery(folder: Path, collected: Collected, class_names: list[str]) -> list[dict[str, Any]]:
    """Saves pictures under numbers, not ids: a report is passed on more easily than a data set."""
    for old in folder.glob("*.jpg"):
        old.unlink()
    entries = []
    order = sorted(collected.gallery, key=lambda item: (collected.truth[item["row"]], item["row"]))
    for number, item in enumerate(order, 1):
        row = item["row"]
        panels = {"picture": item["picture"]}
        panels |= {name: overlay(item["picture"], heat) for name, heat in item["maps"].items()}
        if item["lesion"].any():
            panels["lesion"] = overlay(item["picture"], item["lesion"].astype(np.float32))
        for name, panel in panels.items():
            save_jpeg(folder / f"{number:02d}_{name}.jpg", panel)
        entries.append(
            {
                "truth": class_names[collected.truth[row]],
                "predicted": class_names[int(collected.probability[row].argmax())],
                "probability": float(collected.probability[row].max()),
                "panels": {name: f"{folder.name}/{number:02d}_{name}.jpg" for name in panels},
            }
        )
    return entries
