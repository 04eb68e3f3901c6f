"""Evaluation of a trained run on any data set: grading, calibration, localisation; JSON, table, predictions, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ercn._files import DISCLAIMER, write_csv, write_json
from ercn.checkpoint import RunInfo, load_model
from ercn.config import EvaluateConfig
from ercn.data import DataError, Manifest, Record
from ercn.data.loading import load_manifest, need_split
from ercn.data.scales import CommonGround, common_ground
from ercn.evaluation import metrics
from ercn.evaluation.calibration import fit_temperature, temper
from ercn.evaluation.collecting import Collected, collect
from ercn.evaluation.filters import FILTERS
from ercn.evaluation.infer import ONE_VIEW, Views, pick_device
from ercn.evaluation.unet import load_ceiling
from ercn.models import ERCN
from ercn.report.evaluation import EvaluationResult
from ercn.report.gallery import key_of, write_gallery
from ercn.report.model_card import write_model_card
from ercn.report.page import write_report
from ercn.report.table import print_metrics


def ground_of(info: RunInfo, manifest: Manifest) -> CommonGround | None:
    """On which grades the model is compared with the data set; None where the data set has none."""
    if not manifest.class_names:
        return None
    return common_ground(info.trained_classes, info.config.model.targets, manifest.class_names, manifest.dataset)


def choose_on_validation(info: RunInfo, collected: Collected, manifest: Manifest) -> RunInfo:
    """``info`` with what the validation split of ``manifest`` chooses: temperature, thresholds and contrast.

    thresholds: "referable" DR, by Youden's J; the same for where each of the "grades" begins, for data of another
    scale; "specificity", those of fixed specificities for where each grade begins; "maps" and "lesions" by the best
    pooled IoU. contrast: the best unlearned filter by pooled AUPR, "" where no picture has a lesion.
    """
    ground = ground_of(info, manifest)
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
    return replace(info, temperature=temperature, thresholds=thresholds, contrast=collected.localization.contrast)


def write_evaluation(
    run: Path,
    name: str,
    collected: Collected,
    info: RunInfo,
    manifest: Manifest,
    *,
    map_thresholds: Mapping[str, Any],
    chosen_on: str | None,
    views: Views = ONE_VIEW,
    draws: int,
    seed: int,
) -> EvaluationResult:
    """Writes ``evaluation/name.json``, ``name_predictions.csv`` and ``name_gallery/`` into the run folder.

    map_thresholds: "maps" and "lesions" of ``Localization.thresholds``. chosen_on: the data and split that chose them.
    """
    if not collected.records:
        raise DataError(f"no picture could be read, of {len(collected.unreadable)}; there is nothing to evaluate")
    ground = ground_of(info, manifest)
    probability = temper(collected.probability, info.temperature)
    truth, names, scale, grading = None, info.class_names, None, None
    if ground is not None:
        truth, names = ground.truth(collected.grade), list(ground.scale.names)
        probability = ground.probability(probability)
        positive = metrics.first_referable(len(names))
        cut = ground.scale.cuts[positive - 1]
        scale = {
            "model": list(ground.model.names),
            "data": list(ground.data.names),
            "referable": names[positive:],
            "referable_from": ground.scale.levels[cut],
        }
        begins = ground.model.names[ground.model.cuts.index(cut) + 1]  # the model's class where referable DR begins
        grading = metrics.grading(
            probability,
            truth,
            collected.patients,
            threshold=info.thresholds["grades"][begins],
            draws=draws,
            seed=seed,
            uncalibrated=ground.probability(collected.probability),
            specificity=info.thresholds.get("specificity", {}).get(begins),  # older exports have none
        )
    local, folder = collected.localization, run / "evaluation"
    result = EvaluationResult(
        name=name,
        notice=DISCLAIMER,
        dataset=manifest.dataset,
        manifest=manifest.hash,
        bootstrap={
            "draws": draws,
            "seed": seed,
            "unit": "patient",
            "interval": "95 % percentile (of the calibration error, centred on its value)",
        },
        temperature=info.temperature,
        views=views._asdict(),
        pictures=len(collected.records),
        patients=len(set(collected.patients)),
        class_names=names,
        scale=scale,
        grading=grading,
        localization=local.summary(map_thresholds, draws=draws, seed=seed),
        healthy=local.healthy_summary(map_thresholds, draws=draws, seed=seed),
        map_thresholds=chosen_on,
        disclosure=_disclosure(chosen_on),
        unreadable=collected.unreadable,
        gallery=_write_gallery(folder / f"{name}_gallery", collected, probability, truth, names, manifest.hash),
    )
    rows = []
    for i, record in enumerate(collected.records):
        row = {"id": record.id, "grade": "" if record.grade is None else record.grade}
        row |= {"class": "" if truth is None else int(truth[i]), "predicted": int(probability[i].argmax())}
        rows.append(row | {f"p{k}": f"{p:.6f}" for k, p in enumerate(probability[i])})
    write_csv(folder / f"{name}_predictions.csv", rows)
    write_json(folder / f"{name}.json", result.as_dict())
    return result


def _write_gallery(
    folder: Path,
    collected: Collected,
    probability: np.ndarray,
    truth: np.ndarray | None,
    names: Sequence[str],
    manifest: str,
) -> list[dict[str, Any]]:
    """The gallery in the order of the true classes."""
    shown = sorted(collected.gallery, key=lambda item: (truth is not None and truth[item.row], item.row))
    texts = [
        {
            "key": key_of(manifest, collected.records[item.row].id),
            "truth": None if truth is None else names[truth[item.row]],
            "predicted": names[probability[item.row].argmax()],
            "probability": float(probability[item.row].max()),
        }
        for item in shown
    ]
    return write_gallery(folder, shown, texts)


def _disclosure(source: str | None) -> str:
    """A sentence on which metrics of the maps depend on lesion masks of other pictures."""
    if source is None:
        return "The model saw no lesion mask, and no threshold of a map was chosen with one."
    return (
        f"The model saw no lesion mask, but masks of {source} chose the maps' thresholds, on which IoU, recall and the "
        "heat on healthy eyes depend, and the unlearned filter. AUPR, FROC and pointing game have no threshold."
    )


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Metrics of the run's exported model on one split of its data set or, with ``config.data``, of another.

    Writes ``evaluation/<name>.json``, its predictions and gallery into the run folder, refreshes report.html and
    export/model_card.md, prints a table and returns the JSON's content. <name> is the split; another data set's name
    stands before it, and "-views" after it where the maps are those of several views.

    Nothing is chosen on the split itself: temperature and decision thresholds come from the validation at the end of
    the training. The maps' thresholds come from there too; where that had no masks, or other views, from the val split
    of the training's data set or else of this one. Data with other grades are compared on what both scales have in
    common (``ercn.data.scales``); data with lesion masks and without grades are evaluated for localisation only. A
    patient of the training in the evaluated split is an error.

    Raises ValueError, DataError or FileNotFoundError.
    """
    run = Path(config.run)
    model, info = load_model(run)
    root = config.data or info.config.data.root
    manifest = load_manifest(root)
    own = manifest.hash == info.manifest
    if not own and config.data is None:
        raise ValueError(
            f"{root} has changed since the training (its manifest has another hash), so its splits may leak; "
            f"to evaluate on it as another data set, name it: --data {root}"
        )
    records = need_split(manifest, config.split, root)
    if ground_of(info, manifest) is None and not any(record.masks for record in records):
        raise ValueError(f"data set {manifest.dataset} has neither grades nor lesion masks in the {config.split} split")
    check_normalization(info.normalize, manifest)
    if not own:
        check_patients(info, manifest.dataset, records)
    views = Views(config.scales, config.flip)
    ceiling = _ceiling(config.ceiling, info, pick_device(config.accelerator)) if config.ceiling else None
    thresholds, contrast, chosen_on = _map_thresholds(model, info, manifest, config, ceiling)
    info = replace(info, contrast=contrast)
    collected = collect(model, info, records, config, title=f"evaluate {config.split}", ceiling=ceiling)
    result = write_evaluation(
        run,
        _name(config, manifest, own, views),
        collected,
        info,
        manifest,
        map_thresholds=thresholds,
        chosen_on=chosen_on,
        views=views,
        draws=config.bootstrap,
        seed=config.seed,
    )
    print_metrics(result)
    write_report(run)
    write_model_card(run, info)
    print(run / "report.html", flush=True)
    return result


def _name(config: EvaluateConfig, manifest: Manifest, own: bool, views: Views) -> str:
    dataset = manifest.root.resolve().name if manifest.dataset == "csv" else manifest.dataset
    return (config.split if own else f"{dataset}-{config.split}") + ("" if views == ONE_VIEW else "-views")


def _ceiling(run: str, info: RunInfo, device: torch.device) -> Callable[[torch.Tensor], np.ndarray]:
    """The U-Net of ``run`` for pictures that are normalised as the model wants them."""
    ceiling = load_ceiling(run, device)
    for key in ("image_size", "normalize"):
        if ceiling.info[key] != getattr(info, key):
            raise ValueError(
                f"ceiling {run} was trained with {key} {ceiling.info[key]}, the model with {getattr(info, key)}"
            )
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (info.mean, info.std, ceiling.info["mean"], ceiling.info["std"])
    )
    return lambda image: ceiling((image.to(device) * std + mean - own_mean) / own_std).cpu().numpy()


def _map_thresholds(
    model: ERCN,
    info: RunInfo,
    manifest: Manifest,
    config: EvaluateConfig,
    ceiling: Callable[[torch.Tensor], np.ndarray] | None,
) -> tuple[dict[str, dict], str, str | None]:
    """Thresholds "maps" and "lesions", the reference filter, and the data and split that chose them.

    They come from a validation split with masks: the training's, or else this data set's own.
    """
    maps, lesions, contrast, chosen_on = {}, {}, "", None
    if (config.scales, config.flip) == ONE_VIEW and info.thresholds["maps"]:
        maps, lesions = info.thresholds["maps"], info.thresholds["lesions"]
        contrast, chosen_on = info.contrast or "", f"val of {info.dataset}"
        if ceiling is None:
            return {"maps": maps, "lesions": lesions}, contrast, chosen_on
    trained = _training_data(info)
    for source in (trained, manifest if config.split == "test" else None):
        records = [] if source is None else [record for record in source.split("val") if record.masks]
        if records and source.normalize == info.normalize:
            filters = [info.contrast] if info.contrast else FILTERS
            title = f"thresholds {source.dataset} val"
            val = collect(model, info, records, config, title=title, filters=filters, ceiling=ceiling)
            found = val.localization.thresholds()
            found["maps"] |= maps
            found["lesions"] = {k: own | lesions.get(k, {}) for k, own in (lesions | found["lesions"]).items()}
            return found, val.localization.contrast, chosen_on or f"val of {source.dataset}"
    return {"maps": maps, "lesions": lesions}, contrast, chosen_on


def _training_data(info: RunInfo) -> Manifest | None:
    """The data set of the training; None where it was moved, removed or changed since."""
    try:
        manifest = load_manifest(info.config.data.root)
    except (DataError, ValueError):
        return None
    return manifest if manifest.hash == info.manifest else None


def check_patients(info: RunInfo, dataset: str, records: Sequence[Record]) -> None:
    """Raises ValueError where a patient was in the training, if the training's data set is available.

    Only data sets with the same patient names can be compared: a set with itself, and EyePACS with RLDR.
    """
    same = dataset == info.dataset and dataset not in ("phantom", "csv")
    if not same and {dataset, info.dataset} != {"eyepacs", "rldr"}:
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


def check_normalization(normalize: str, manifest: Manifest) -> None:
    """Raises ValueError where the pictures were not prepared like those of the training, with ``normalize``."""
    if manifest.normalize != normalize:
        raise ValueError(
            f"the model was trained on pictures of `ercn prepare --normalize {normalize}`, but {manifest.root} "
            f"was prepared with {manifest.normalize}; prepare it again in a new folder"
        )
