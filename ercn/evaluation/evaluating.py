"""Evaluation of a trained run on any data set: grading, calibration, localisation; JSON, table, predictions, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ercn._files import DISCLAIMER, write_csv, write_json
from ercn._progress import with_progress
from ercn.checkpoint import load_model
from ercn.config import EvaluateConfig, TrainConfig
from ercn.data import DataError, Manifest, Record
from ercn.data.entries import OPTIC_DISC
from ercn.data.loading import load_manifest, make_loader, need_split, picture_dataset
from ercn.data.scales import CommonGround, common_ground
from ercn.evaluation import metrics
from ercn.evaluation.calibration import fit_temperature, temper
from ercn.evaluation.filters import FILTERS, contrasts
from ercn.evaluation.infer import ONE_VIEW, Views, forward, pick_device
from ercn.evaluation.localization import Localization
from ercn.evaluation.unet import load_ceiling
from ercn.maps import ceiling_of, enlarge
from ercn.models import ERCN
from ercn.report.gallery import Shown, as_picture, gallery_choice, key_of, write_gallery
from ercn.report.model_card import write_model_card
from ercn.report.page import write_report
from ercn.report.table import print_metrics


@dataclass
class Collected:
    """What the model says about one split; rows in the order of the pictures that could be read.

    probability: [N, K] of the model's own classes, before calibration. grade: [N], -1 where there is none.
    contrast: the unlearned filter of the reference "contrast", "" for none.
    """

    records: list[Record] = field(default_factory=list)
    probability: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    localization: Localization = field(default_factory=Localization)
    gallery: list[Shown] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    contrast: str = ""

    @property
    def patients(self) -> list[str]:
        return [record.patient for record in self.records]

    @property
    def grade(self) -> np.ndarray:
        return np.array([-1 if record.grade is None else record.grade for record in self.records], int)


def collect(
    model: ERCN,
    info: dict[str, Any],
    records: Sequence[Record],
    *,
    views: Views = ONE_VIEW,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: bool,
    title: str,
    ceiling: Callable[[torch.Tensor], np.ndarray] | None = None,
) -> Collected:
    """Runs the model over the pictures, each once, and keeps probabilities, map statistics and the gallery.

    Where some have masks, the references are measured beside the maps: "contrast", by the filter ``info["contrast"]``;
    "stride_ceiling", what the masks themselves would be on the grid of the CAM; and "supervised", by ``ceiling``, from
    pictures as the model sees them [B, 3, S, S] to maps [B, S, S]. Without that key, all filters are tried and the one
    of the highest AUPR on these pictures is kept, so they must be validation's; where it is "", there is none.
    """
    config = info["config"]
    chosen = info.get("contrast")
    filters = list(FILTERS) if chosen is None else [chosen] if chosen else []
    masked = any(record.masks for record in records)
    if not masked:
        filters, ceiling = [], None
    dataset = picture_dataset(records, info["mean"], info["std"], config.data, seed=0, augment=False, with_masks=True)
    loader = make_loader(dataset, batch_size, workers)
    shown = set(gallery_choice(records))
    result, parts, seen = Collected(localization=Localization(marked=masked)), [], []
    batches = with_progress(loader, title, len(loader), progress)
    for batch, probability, maps in forward(model, config.model, batches, device, views):
        size, corners = config.data.image_size, model.align_corners
        full = {name: enlarge(heat, size, corners).numpy() for name, heat in maps.items()}
        parts.append(probability)
        told = None if ceiling is None else ceiling(batch["image"])
        for i, index in enumerate(batch["index"].tolist()):
            masks = dict(zip(dataset.mask_kinds, batch["masks"][i].numpy()))
            heats = {name: heat[i] for name, heat in full.items()}
            if index in shown:
                picture = as_picture(batch["image"][i], info["mean"], info["std"])
                result.gallery.append(Shown(len(seen), picture, heats, dict(masks)))
            disc = masks.pop(OPTIC_DISC)
            healthy = records[index].grade == 0
            references = {}
            if masked and (healthy or records[index].masks):
                if filters:
                    references |= contrasts(as_picture(batch["image"][i], info["mean"], info["std"]), filters)
                union = np.logical_or.reduce(list(masks.values()))
                references["stride_ceiling"] = ceiling_of(union, maps["cam"].shape[1:], corners)
            if told is not None:
                references["supervised"] = told[i]
            patient = records[index].patient
            result.localization.add(heats, masks, patient, disc, healthy=healthy, references=references)
            seen.append(index)
    result.contrast = result.localization.settle(filters, "contrast")
    result.records = [records[i] for i in seen]
    read = set(seen)
    result.unreadable = [r.id for i, r in enumerate(records) if i not in read]
    if parts:
        result.probability = np.concatenate(parts)
    return result


def ground_of(info: dict[str, Any], manifest: Manifest) -> CommonGround | None:
    """On which grades the model is compared with the data set; None where the data set has none."""
    if not manifest.class_names:
        return None
    targets = info["config"].model.targets
    return common_ground(info["trained_classes"], targets, manifest.class_names, manifest.dataset)


def choose_on_validation(collected: Collected, ground: CommonGround) -> dict[str, Any]:
    """What the export keeps of the validation split: the temperature, and the decision thresholds.

    thresholds: "referable" DR, by Youden's J; the same for each "grades"' beginning, for data of another scale;
    "specificity", for each grade's beginning those of fixed specificities; "maps" and "lesions" by the best pooled IoU.
    contrast: the best unlearned filter by pooled AUPR, "" where no picture has a lesion.
    """
    truth = ground.truth(collected.grade)
    temperature = fit_temperature(collected.probability, truth)
    probability = temper(collected.probability, temperature)
    grades, specificity = {}, {}
    for k, name in enumerate(ground.model.names[1:], 1):
        score, positive = probability[:, k:].sum(1), truth >= k
        grades[name] = metrics.youden_threshold(score, positive)
        specificity[name] = metrics.specificity_thresholds(score, positive)
    referable = grades[ground.model.names[metrics.first_referable(len(ground.model.names))]]
    thresholds = {"referable": referable, "grades": grades, "specificity": specificity}
    thresholds |= collected.localization.thresholds()
    return {"temperature": temperature, "thresholds": thresholds, "contrast": collected.contrast}


def write_evaluation(
    run: Path,
    name: str,
    collected: Collected,
    info: dict[str, Any],
    manifest: Manifest,
    *,
    map_thresholds: Mapping[str, Any],
    views: Views = ONE_VIEW,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Writes ``evaluation/name.json``, ``name_predictions.csv`` and ``name_gallery/`` into the run folder.

    map_thresholds: "maps", "lesions" and "from", the validation split that they were chosen on.
    """
    if not collected.records:
        raise DataError(f"no picture could be read, of {len(collected.unreadable)}; there is nothing to evaluate")
    ground = ground_of(info, manifest)
    probability = temper(collected.probability, info["temperature"])
    result = {
        "name": name,
        "notice": DISCLAIMER,
        "dataset": manifest.dataset,
        "manifest": manifest.hash,
        "bootstrap": {
            "draws": draws,
            "seed": seed,
            "unit": "patient",
            "interval": "95 % percentile (of the calibration error, centred on its value)",
        },
        "temperature": info["temperature"],
        "views": views._asdict(),
        "pictures": len(collected.records),
        "patients": len(set(collected.patients)),
    }
    local = collected.localization.summary(map_thresholds, draws=draws, seed=seed)
    if ground is None:
        truth, names = None, info["class_names"]
        result |= {"class_names": names, "scale": None, "metrics": None}
    else:
        truth, names = ground.truth(collected.grade), list(ground.scale.names)
        probability = ground.probability(probability)
        positive = metrics.first_referable(len(names))
        begins = _begins(ground, positive)
        threshold = info["thresholds"]["grades"][begins]
        result |= {
            "class_names": names,
            "scale": {
                "model": list(ground.model.names),
                "data": list(ground.data.names),
                "referable": list(ground.scale.names[positive:]),
                "referable_from": ground.scale.levels[ground.scale.cuts[positive - 1]],
            },
            "threshold": threshold,
            **metrics.grading(
                probability,
                truth,
                collected.patients,
                threshold=threshold,
                draws=draws,
                seed=seed,
                uncalibrated=ground.probability(collected.probability),
                specificity=info["thresholds"].get("specificity", {}).get(begins),  # exports before it was chosen
            ),
        }
    predicted = probability.argmax(1)
    shown = sorted(collected.gallery, key=lambda item: (truth is not None and truth[item.row], item.row))
    texts = [
        {
            "key": key_of(manifest.hash, collected.records[item.row].id),
            "truth": None if truth is None else names[truth[item.row]],
            "predicted": names[predicted[item.row]],
            "probability": float(probability[item.row].max()),
        }
        for item in shown
    ]
    result |= {
        "localization": None if local is None else local | {"contrast": collected.contrast},
        "healthy": collected.localization.healthy_summary(map_thresholds, draws=draws, seed=seed),
        "map_thresholds": map_thresholds.get("from"),
        "disclosure": _disclosure(map_thresholds.get("from")),
        "unreadable": collected.unreadable,
        "gallery": write_gallery(run / "evaluation" / f"{name}_gallery", shown, texts),
    }
    rows = []
    for i, record in enumerate(collected.records):
        row = {"id": record.id, "grade": "" if record.grade is None else record.grade}
        row |= {"class": "" if truth is None else int(truth[i]), "predicted": int(predicted[i])}
        rows.append(row | {f"p{k}": f"{p:.6f}" for k, p in enumerate(probability[i])})
    write_csv(run / "evaluation" / f"{name}_predictions.csv", rows)
    write_json(run / "evaluation" / f"{name}.json", result)
    return result


def _disclosure(source: str | None) -> str:
    """What in the metrics of maps has used lesion masks of other pictures."""
    if source is None:
        return "The model saw no lesion mask, and no threshold of a map was chosen with one."
    return (
        f"The model saw no lesion mask, but masks of {source} chose the maps' thresholds, on which IoU, recall and the "
        "heat on healthy eyes depend, and the unlearned filter. AUPR, FROC and pointing game have no threshold."
    )


def _begins(ground: CommonGround, positive: int) -> str:
    """The model's class that begins where class ``positive`` in common does."""
    return ground.model.names[ground.model.cuts.index(ground.scale.cuts[positive - 1]) + 1]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of the run's exported model on one split of its data set or, with ``config.data``, of another.

    Writes ``evaluation/<name>.json``, its predictions and gallery into the run folder, refreshes report.html and
    export/model_card.md, prints a table and returns what the JSON holds. <name> is the split, with the data set's name
    before it where it is another one, and "-views" after it where the maps are those of several views.

    Nothing is chosen on the split itself: temperature and decision thresholds come from the validation at the end of
    the training, those of the maps from there too; where that had no masks, or other views, from the val split of the
    training's data set or else of this one. Data with other grades are compared on what both scales have in common
    (``ercn.data.scales``); data with lesion masks and without grades are evaluated for localisation only. A patient of
    the training in the evaluated split is an error.

    Raises ValueError, DataError or FileNotFoundError.
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
    records = need_split(manifest, config.split, root)
    if ground_of(info, manifest) is None and not any(record.masks for record in records):
        raise ValueError(f"data set {manifest.dataset} has neither grades nor lesion masks in the {config.split} split")
    check_normalization(info, manifest)
    if not own:
        check_patients(info, manifest.dataset, records)
    views = Views(config.scales, config.flip)
    options = {
        "views": views,
        "batch_size": config.batch_size,
        "workers": config.workers,
        "device": pick_device(config.accelerator),
        "progress": config.progress,
    }
    if config.ceiling:
        options["ceiling"] = _ceiling(config.ceiling, info, options["device"])
    thresholds = _map_thresholds(model, info, manifest, config.split, options)
    info |= {"contrast": thresholds.get("contrast", "")}
    collected = collect(model, info, records, title=f"evaluate {config.split}", **options)
    result = write_evaluation(
        run,
        _name(config, manifest, own, views),
        collected,
        info,
        manifest,
        map_thresholds=thresholds,
        views=views,
        draws=config.bootstrap,
        seed=config.seed,
    )
    print_metrics(result)
    write_report(run)
    write_model_card(run)
    print(run / "report.html", flush=True)
    return result


def _name(config: EvaluateConfig, manifest: Manifest, own: bool, views: Views) -> str:
    dataset = manifest.root.resolve().name if manifest.dataset == "csv" else manifest.dataset
    return (config.split if own else f"{dataset}-{config.split}") + ("" if views == ONE_VIEW else "-views")


def _ceiling(run: str, info: dict[str, Any], device: torch.device) -> Callable[[torch.Tensor], np.ndarray]:
    """The U-Net of ``run`` for pictures that are normalised as the model wants them."""
    ceiling = load_ceiling(run, device)
    for key in ("image_size", "normalize"):
        if ceiling.info[key] != info[key]:
            raise ValueError(f"ceiling {run} was trained with {key} {ceiling.info[key]}, the model with {info[key]}")
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (info["mean"], info["std"], ceiling.info["mean"], ceiling.info["std"])
    )
    return lambda image: ceiling((image.to(device) * std + mean - own_mean) / own_std).cpu().numpy()


def _map_thresholds(
    model: ERCN, info: dict[str, Any], manifest: Manifest, split: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Thresholds of the maps, and the filter of the reference, from a validation split that has masks: the training's,
    or this data set's own.
    """
    exported: dict[str, Any] = {}
    if options["views"] == ONE_VIEW and info["thresholds"]["maps"]:
        exported = {key: info["thresholds"][key] for key in ("maps", "lesions")}
        exported |= {"contrast": info.get("contrast", ""), "from": f"val of {info['dataset']}"}
        if "ceiling" not in options:
            return exported
    trained = _training_data(info)
    sources = [trained] if trained is not None else []
    sources += [manifest] if split == "test" else []
    about = info if info.get("contrast") else {key: value for key, value in info.items() if key != "contrast"}
    for source in sources:
        records = [record for record in source.split("val") if record.masks]
        if records and source.normalize == info["normalize"]:
            collected = collect(model, about, records, title=f"thresholds {source.dataset} val", **options)
            found = collected.localization.thresholds()
            maps, lesions = exported.get("maps", {}), exported.get("lesions", {})
            return {
                "maps": found["maps"] | maps,
                "lesions": {kind: own | lesions.get(kind, {}) for kind, own in (lesions | found["lesions"]).items()},
                "contrast": collected.contrast,
                "from": exported.get("from", f"val of {source.dataset}"),
            }
    return exported


def _training_data(info: dict[str, Any]) -> Manifest | None:
    """The data set of the training, where it is as it was."""
    try:
        manifest = load_manifest(info["config"].data.root)
    except (DataError, ValueError):  # moved or removed since
        return None
    return manifest if manifest.hash == info["manifest"] else None


def check_patients(info: dict[str, Any], dataset: str, records: Sequence[Record]) -> None:
    """Raises ValueError where a patient was in the training, as far as the training's data set is at hand.

    Only sets that name the same patients alike can be compared: a set with itself, and EyePACS with RLDR.
    """
    same = dataset == info["dataset"] and dataset not in ("phantom", "csv")
    if not same and {dataset, info["dataset"]} != {"eyepacs", "rldr"}:
        return
    trained = _training_data(info)
    if trained is None:
        print(f"the training's data set is not at hand: patients of {dataset} may have been in it", flush=True)
        return
    seen = {record.patient for record in trained.records if record.split != "test"}
    both = sorted(seen & {record.patient for record in records})
    if both:
        raise ValueError(
            f"{len(both)} patients of this {dataset} split were in the training: {', '.join(both[:5])}"
            f"{', …' if len(both) > 5 else ''}; prepare the training's data without them (ercn prepare --exclude)"
        )


def check_classes(config: TrainConfig, manifest: Manifest) -> None:
    """Raises ValueError where the data set has not the grades that ``model.num_grades`` says."""
    grades = config.model.num_grades
    if not manifest.class_names:
        raise ValueError(f"data set {manifest.dataset} has no grades; training needs them")
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
