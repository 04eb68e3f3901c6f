"""Training of ERCN: Lightning's loop, then export, thresholds from validation, and the report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from ercn._seeding import derive
from ercn.checkpoint import RunInfo, save_model
from ercn.config import TrainConfig
from ercn.data import Manifest
from ercn.data.loading import class_counts, labelled, load_manifest, need_split
from ercn.data.scales import scale_of
from ercn.data.splits import SPLITS
from ercn.evaluation.collecting import collect
from ercn.evaluation.evaluating import choose_on_validation, write_evaluation
from ercn.evaluation.filters import FILTERS
from ercn.maps import LOST
from ercn.models import ERCN, check_side
from ercn.pretrained import Loaded
from ercn.report.model_card import write_model_card
from ercn.report.page import write_report
from ercn.report.table import print_metrics
from ercn.training import run_folder, steps
from ercn.training.callbacks import SafeCheckpointIO
from ercn.training.loaders import GradedData
from ercn.training.module import MONITOR, ERCNModule
from ercn.training.planning import advice

BOOTSTRAP = 2000  # draws for the validation metrics at the end


def train(config: TrainConfig) -> Path:
    """Trains ERCN on a prepared folder and leaves a complete run in ``run.out``; returns that folder.

    The folder holds config.yaml, environment.json, metrics.csv (one row an epoch), checkpoints/last.ckpt and
    best.ckpt (highest validation quadratic weighted kappa), export/model.safetensors and model.json (the best epoch),
    evaluation/val.json, and report.html. All random draws are functions of ``run.seed``: on the CPU a run that is
    killed and resumed (``run.resume``) ends with the same bits.
    Raises ValueError, DataError or FileNotFoundError naming argument or file.
    """
    manifest = load_manifest(config.data.root)
    for split in ("train", "val"):
        need_split(manifest, split, config.data.root)
    check_classes(config, manifest)
    check_losses(config)
    check_batchnorm(config)
    check_patches(config)
    check_start(config)
    torch.manual_seed(derive(config.run.seed, "init"))
    model = ERCN(config.model if config.init is None else replace(config.model, pretrained=config.init))
    check_size(model, config)
    loaded = model.backbone.loaded
    info = describe(config, manifest, loaded)
    if loaded is not None and rank_zero_only.rank == 0:
        print(loaded, flush=True)
    module = ERCNModule(model, config, class_weights(config, manifest))
    steps.set_up(module, model, config.run)
    trainer = run_folder.make_trainer(config.run, monitor=MONITOR)
    checkpoint = run_folder.open_run(config)
    data = GradedData(manifest, config.data, seed=config.run.seed)
    if run_folder.fit(trainer, module, data, checkpoint, lambda: advice(config)):
        finish(model, replace(info, unreadable=data.unreadable), manifest)
    return Path(config.run.out)


def finish(model: ERCN, info: RunInfo, manifest: Manifest) -> None:
    """Loads the best epoch, calibrates and chooses thresholds on validation, exports, and writes evaluation, report and
    model card.

    The weights are float32 from here on, whatever ``run.precision`` trained in.
    """
    run = info.config.run
    out = Path(run.out)
    best = SafeCheckpointIO().load_checkpoint(out / "checkpoints" / "best.ckpt")
    prefix = "model."
    state = {key[len(prefix) :]: value for key, value in best["state_dict"].items() if key.startswith(prefix)}
    model.float().load_state_dict(state, strict=True)
    with open(out / "metrics.csv", encoding="utf-8") as file:
        flat = float(list(csv.DictReader(file))[best["epoch"]]["val_flat_cam"])
    if flat > LOST:
        print(f"the CAM is flat in {flat:.0%} of the val pictures with disease: its maps point at nothing")
    collected = collect(model, info, manifest.split("val"), title="evaluate val", filters=FILTERS)
    info = choose_on_validation(info, collected, manifest)
    parameters = sum(p.numel() for p in model.parameters())
    info = replace(info, epoch=best["epoch"] + 1, parameters=parameters, flat_cam=flat)
    save_model(out, model, info)
    result = write_evaluation(
        out,
        "val",
        collected,
        info,
        manifest,
        map_thresholds=info.thresholds,
        chosen_on=f"val of {manifest.dataset}",
        draws=BOOTSTRAP,
        seed=run.seed,
    )
    print_metrics(result)
    write_report(out)
    write_model_card(out, info)


def check_classes(config: TrainConfig, manifest: Manifest) -> None:
    """Raises ValueError for a data set whose number of grades is not ``model.num_grades``."""
    grades = config.model.num_grades
    if not manifest.class_names:
        raise ValueError(f"data set {manifest.dataset} has no grades; training needs them")
    if len(manifest.class_names) != grades:
        raise ValueError(
            f"the model grades {grades} classes (model.num_grades), but data set {manifest.dataset} has "
            f"{len(manifest.class_names)}: {', '.join(manifest.class_names)}"
        )


def check_batchnorm(config: TrainConfig) -> None:
    """Raises ValueError for BatchNorm that would be frozen at its first values, which normalise nothing."""
    if config.run.freeze_batchnorm and config.init is None and not config.model.pretrained:
        raise ValueError(
            "run.freeze_batchnorm keeps BatchNorm as the pre-training has it, and there is none: give --init (a run of "
            "ercn pretrain) or --model.pretrained (true or a file), or set --run.freeze_batchnorm false"
        )


def check_start(config: TrainConfig) -> None:
    """Raises ValueError where two options say what the backbone starts from."""
    if config.init is not None and config.model.pretrained:
        raise ValueError(
            f"init {config.init} and model.pretrained {config.model.pretrained} both say what the backbone starts "
            "from: give one of them"
        )


def check_size(model: ERCN, config: TrainConfig) -> None:
    """Raises ValueError where a network of fixed picture size does not take the pictures of one of the views."""
    side, views = config.data.image_size, [1.0]
    if config.loss.transform == "rescale":
        views.append(config.loss.rescale)
    for scale in views:
        try:
            check_side(model, round(scale * side), refine=False)
        except ValueError as error:
            if scale == 1:
                raise
            raise ValueError(f"loss.transform 'rescale' makes pictures of another size: {error}") from error


def check_patches(config: TrainConfig) -> None:
    """Raises ValueError for pictures that are no multiple of the patch."""
    patch, size = config.model.patch, config.data.image_size
    if patch and size % patch:
        raise ValueError(
            f"data.image_size must be a multiple of model.patch {patch}; got {size}, next to it is "
            f"{max(1, round(size / patch)) * patch}"
        )


def check_losses(config: TrainConfig) -> None:
    """Raises ValueError for losses that train the affinity's embedding alone where there is no affinity."""
    if config.model.detach and "affinity" not in config.model.refinement:
        for name in ("ecr", "min_pool"):
            if getattr(config.loss, name):
                raise ValueError(
                    f"loss.{name} is {getattr(config.loss, name)}, but it trains the embedding of the affinity, which "
                    f"model.refinement {list(config.model.refinement)} does not have; set it to 0 or add the affinity"
                )


def describe(config: TrainConfig, manifest: Manifest, loaded: Loaded | None = None) -> RunInfo:
    """The fields known before training. loaded: report on the backbone's weight file."""
    return RunInfo(
        config=config,
        class_names=list(scale_of(manifest.class_names, config.model.targets).names),
        trained_classes=list(manifest.class_names),
        image_size=config.data.image_size,
        prepared_size=manifest.size,
        mean=list(manifest.mean),
        std=list(manifest.std),
        normalize=manifest.normalize,
        dataset=manifest.dataset,
        manifest=manifest.hash,
        data={"label": manifest.label, "splits": {split: _counts(manifest, split) for split in SPLITS}},
        pretrained=None if loaded is None else loaded.as_dict(),
    )


def _counts(manifest: Manifest, split: str) -> dict[str, object]:
    records = manifest.split(split)
    grades = class_counts(records, len(manifest.class_names)).tolist()
    return {"pictures": len(records), "patients": len({r.patient for r in records}), "grades": grades}


def class_weights(config: TrainConfig, manifest: Manifest) -> torch.Tensor | None:
    """With ``data.balance`` "weights": N / (grades present · pictures of the grade); mean 1 over the pictures."""
    if config.data.balance != "weights":
        return None
    records = labelled(manifest.split("train"), config.data.label_fraction, config.run.seed)
    counts = torch.as_tensor(class_counts(records, config.model.num_grades), dtype=torch.float32)
    weights = counts.sum() / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, torch.zeros_like(weights))
