"""The supervised ceiling of every heat map: a small U-Net (Ronneberger et al. 2015) that is trained on lesion masks.

It shows what can be learned from the same pictures where the network is given the lesions; maps from grades alone are
measured against it. It learns the union of all lesions, pixel by pixel, and its map is the probability of a lesion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ercn._seeding import derive
from ercn.checkpoint import save_weights
from ercn.config import CeilingConfig
from ercn.data import Manifest, Record
from ercn.data.loading import load_manifest, make_loader
from ercn.evaluation.localization import LEVELS, average_precision, histograms, levels_of, precision_recall
from ercn.evaluation.unet import UNet
from ercn.training import run_folder, steps
from ercn.training.callbacks import SafeCheckpointIO
from ercn.training.loaders import PictureData

MONITOR = "val_aupr"
JITTER = 0.1  # standard deviation of the change of each channel's contrast and brightness, in the pictures' own
LESS_MEMORY = "less is needed with a smaller --data.batch_size or --data.image_size"


def annotated(records: Sequence[Record]) -> list[Record]:
    """The records whose lesions are known.

    Data sets have mask files only for lesions that are there. A picture without masks counts as free of lesions where
    its grade is 0 or missing; with a higher grade its lesions were not annotated, and it is left out.
    """
    return [record for record in records if record.masks or not record.grade]


def lesions_of(batch: dict[str, Tensor]) -> Tensor:
    """Union of the lesions, bool [B, S, S]; the last mask is the optic disc's."""
    return batch["masks"][:, :-1].any(1)


class AnnotatedData(PictureData):
    """Training and validation pictures with masks, not augmented: ``squares`` moves picture and masks together."""

    def _records(self) -> list[Record]:
        return annotated(self.manifest.split("train"))

    def _training(self) -> dict[str, Any]:
        return {"augment": False, "with_masks": True}

    def val_dataloader(self) -> DataLoader:
        pictures = self._pictures(annotated(self.manifest.split("val")), **self._training())
        return make_loader(pictures, self.config.batch_size, self.config.workers)


class Supervised(pl.LightningModule):
    """Binary cross entropy of each pixel, mean over all; validation pixel AUPR of all lesions once an epoch.

    The AUPR is that of ``ercn.evaluation.localization``: of pictures with lesions, without the optic disc.
    """

    def __init__(self, network: UNet, config: CeilingConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.counts = np.zeros((1, 2, LEVELS))

    def configure_optimizers(self) -> dict[str, Any]:
        return steps.adamw(self, self.config.run)

    def training_step(self, batch: dict[str, Tensor] | None, step: int) -> Tensor | None:
        if batch is None:  # every picture was unreadable
            return None
        image, lesion = batch["image"], lesions_of(batch).float()
        if self.config.data.augment:
            torch.manual_seed(derive(self.config.run.seed, "step", self.current_epoch, step))
            image, lesion = squares(image, lesion)
        logits = self.network(steps.laid_out(image, self.config.run)).float()
        loss = F.binary_cross_entropy_with_logits(logits, lesion)
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(image))
        return loss

    def validation_step(self, batch: dict[str, Tensor] | None, step: int) -> None:
        if batch is None:
            return
        heat = self.network(steps.laid_out(batch["image"], self.config.run)).float().sigmoid().cpu().numpy()
        disc = batch["masks"][:, -1].cpu().numpy()
        for own, lesion, left_out in zip(heat, lesions_of(batch).cpu().numpy(), disc):
            if lesion.any():
                self.counts[0] += histograms(levels_of(own), lesion, ~left_out | lesion)

    def on_validation_epoch_end(self) -> None:
        if not self.counts[0, 1].any():
            raise ValueError(
                f"no lesion of the val split could be read at {self.config.data.image_size} px, so the best epoch "
                "cannot be chosen"
            )
        precision, recall, _ = precision_recall(self.counts)
        self.counts = np.zeros_like(self.counts)
        self.log(MONITOR, float(average_precision(precision, recall)[0]), prog_bar=True)


def squares(image: Tensor, lesion: Tensor) -> tuple[Tensor, Tensor]:
    """Random squares of pictures [B, 3, S, S] and their lesions [B, S, S], turned and mirrored (eight positions).

    The side is half of S, and at least 64 px. In half of the pictures with lesions the square lies around a pixel of
    one, else anywhere: lesions are a small part of a picture. Channel c becomes x (1 + a_c) + b_c with a and b normally
    distributed. Draws from torch's generator.
    """
    size = image.shape[-1]
    side = min(size, max(64, 8 * round(size / 16)))
    parts = []
    for both in torch.cat([image, lesion[:, None]], 1):
        places = both[3].nonzero().cpu()
        center = torch.randint(size, (2,))
        if len(places) and torch.rand(()) < 0.5:
            center = places[torch.randint(len(places), ())] + torch.randint(-side // 3, side // 3, (2,))
        top, left = (center - side // 2).clamp(0, size - side).tolist()
        part = both[:, top : top + side, left : left + side].rot90(int(torch.randint(4, ())), (1, 2))
        parts.append(part.flip(-1) if torch.rand(()) < 0.5 else part)
    both = torch.stack(parts)
    contrast, brightness = (JITTER * torch.randn(2, len(both), 3, 1, 1)).to(both.device)
    return both[:, :3] * (1 + contrast) + brightness, both[:, 3]


def train_ceiling(config: CeilingConfig) -> Path:
    """Trains the U-Net on a prepared folder with lesion masks and leaves it in ``run.out``; returns that folder.

    The folder holds config.yaml, environment.json, metrics.csv (loss and validation AUPR of each epoch), checkpoints,
    and export/ceiling.safetensors and ceiling.json of the epoch of the highest validation AUPR, which ``load_ceiling``
    reads. Deterministic on the CPU: killed and resumed (``run.resume``), it ends with the same weights. Raises
    ValueError or DataError naming argument, folder or file, also where the train or the val split has no masks.
    """
    run = config.run
    manifest = load_manifest(config.data.root)
    for split in ("train", "val"):
        if not any(record.masks for record in manifest.split(split)):
            raise ValueError(
                f"{config.data.root} has no picture with a lesion mask in the {split} split; the supervised ceiling "
                "needs them in train and val"
            )
    if run_folder.processes(run) != (1, 1) or run.grad_checkpointing:
        raise ValueError(
            "the supervised ceiling is a small network: it is trained on one device, without gradient checkpointing; "
            f"got run.devices {run.devices}, run.num_nodes {run.num_nodes}, "
            f"run.grad_checkpointing {run.grad_checkpointing}"
        )
    torch.manual_seed(derive(run.seed, "init"))
    network = UNet(config.width)
    module = Supervised(network, config)
    steps.set_up(module, network, run)
    trainer = run_folder.make_trainer(run, monitor=MONITOR)
    checkpoint = run_folder.open_run(config)
    data = AnnotatedData(manifest, config.data, seed=run.seed)
    run_folder.fit(trainer, module, data, checkpoint, lambda: LESS_MEMORY)
    _export(Path(run.out), network, config, manifest, data.unreadable)
    return Path(run.out)


def _export(
    out: Path, network: UNet, config: CeilingConfig, manifest: Manifest, unreadable: list[dict[str, str]]
) -> None:
    best = SafeCheckpointIO().load_checkpoint(out / "checkpoints" / "best.ckpt")
    score = next(iter(c["best_model_score"] for c in best["callbacks"].values() if c.get("monitor") == MONITOR))
    save_weights(
        out / "export",
        "ceiling",
        {key.removeprefix("network."): value for key, value in best["state_dict"].items()},
        {
            "config": asdict(config),
            "width": config.width,
            "image_size": config.data.image_size,
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "normalize": manifest.normalize,
            "dataset": manifest.dataset,
            "manifest": manifest.hash,
            "epoch": best["epoch"] + 1,
            "val_aupr": float(score),
            "parameters": sum(p.numel() for p in network.parameters()),
            "unreadable": unreadable,
        },
    )
