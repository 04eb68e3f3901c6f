"""One pass of a model over the pictures of a split: probabilities, counts of the maps, and pictures for the gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ercn._progress import with_progress
from ercn.checkpoint import RunInfo
from ercn.config import DataConfig, EvaluateConfig
from ercn.data import PictureDataset, Record
from ercn.data.entries import OPTIC_DISC
from ercn.data.loading import make_loader, picture_dataset
from ercn.evaluation.filters import contrasts
from ercn.evaluation.infer import Views, forward, pick_device
from ercn.evaluation.localization import Localization
from ercn.maps import ceiling_of, enlarge
from ercn.models import ERCN
from ercn.report.gallery import Shown, as_picture, gallery_choice


@dataclass
class Collected:
    """Outputs of the model on one split; rows in the order of the pictures that could be read.

    probability: [N, K] of the model's own classes, before calibration. grade: [N], -1 where there is none.
    """

    records: list[Record] = field(default_factory=list)
    probability: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    localization: Localization = field(default_factory=Localization)
    gallery: list[Shown] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def patients(self) -> list[str]:
        return [record.patient for record in self.records]

    @property
    def grade(self) -> np.ndarray:
        return np.array([-1 if record.grade is None else record.grade for record in self.records], int)


def collect(
    model: ERCN,
    info: RunInfo,
    records: Sequence[Record],
    settings: EvaluateConfig | None = None,
    *,
    title: str = "",
    filters: Iterable[str] | None = None,
    ceiling: Callable[[torch.Tensor], np.ndarray] | None = None,
) -> Collected:
    """Runs the model over the pictures, each once, and keeps probabilities, map statistics and the gallery.

    settings: batch size, workers, device, progress bar and views of the maps; None takes those of the training.

    Where some pictures have masks, the references are measured beside the maps: "contrast", by an unlearned filter;
    "stride_ceiling", the masks themselves on the grid of the CAM; and "supervised", by ``ceiling``, from pictures as
    the model sees them [B, 3, S, S] to maps [B, S, S]. filters: those to try, of which the one of the highest AUPR on
    these pictures is kept, so several are for validation only; None: the filter that validation chose, if any.
    """
    config = info.config
    data, run = config.data, config.run
    if settings is None:
        settings = EvaluateConfig(
            batch_size=data.batch_size, workers=data.workers, accelerator=run.accelerator, progress=run.progress
        )
    chosen = [info.contrast] if info.contrast else []
    filters = chosen if filters is None else list(filters)
    masked = any(record.masks for record in records)
    if not masked:
        filters, ceiling = [], None
    dataset = with_masks(records, info.mean, info.std, data)
    loader = make_loader(dataset, settings.batch_size, settings.workers)
    batches = with_progress(loader, title, len(loader), settings.progress)
    views, device = Views(settings.scales, settings.flip), pick_device(settings.accelerator)
    shown = set(gallery_choice(records))
    result, parts, seen = Collected(localization=Localization(marked=masked)), [], []
    for batch, probability, maps in forward(model, config.model, batches, device, views):
        size, corners = data.image_size, model.align_corners
        full = {name: enlarge(heat, size, corners).numpy() for name, heat in maps.items()}
        parts.append(probability)
        supervised = None if ceiling is None else ceiling(batch["image"])
        for i, (index, masks) in enumerate(masks_of(batch, dataset)):
            heats = {name: heat[i] for name, heat in full.items()}
            if filters or index in shown:
                picture = as_picture(batch["image"][i], info.mean, info.std)
            if index in shown:
                result.gallery.append(Shown(len(seen), picture, heats, masks))
            references = {}
            if masked and (records[index].grade == 0 or records[index].masks):
                references |= contrasts(picture, filters) if filters else {}
                union = np.logical_or.reduce([mask for kind, mask in masks.items() if kind != OPTIC_DISC])
                references["stride_ceiling"] = ceiling_of(union, maps["cam"].shape[1:], corners)
            if supervised is not None:
                references["supervised"] = supervised[i]
            add_picture(result.localization, heats, masks, records[index], references)
            seen.append(index)
    result.localization.settle(filters)
    result.records = [records[i] for i in seen]
    read = set(seen)
    result.unreadable = [r.id for i, r in enumerate(records) if i not in read]
    if parts:
        result.probability = np.concatenate(parts)
    return result


def with_masks(
    records: Sequence[Record], mean: Sequence[float], std: Sequence[float], config: DataConfig
) -> PictureDataset:
    """The pictures as they are, normalised, with their masks."""
    return picture_dataset(records, mean, std, config, seed=0, augment=False, with_masks=True)


def masks_of(batch: Mapping[str, torch.Tensor], dataset: PictureDataset) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """For each picture of a batch its index, and its masks bool [S, S] by kind, the optic disc's among them."""
    for index, masks in zip(batch["index"].tolist(), batch["masks"].numpy()):
        yield index, dict(zip(dataset.mask_kinds, masks))


def add_picture(
    local: Localization,
    maps: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    record: Record,
    references: Mapping[str, np.ndarray] | None = None,
) -> None:
    """``Localization.add`` of a picture with its masks of ``masks_of``."""
    lesions = {kind: mask for kind, mask in masks.items() if kind != OPTIC_DISC}
    healthy = record.grade == 0
    local.add(maps, lesions, record.patient, masks[OPTIC_DISC], healthy=healthy, references=references)
