"""Lightning callbacks of a run: metrics.csv, weight averaging, checkpoints that survive a kill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ercn._files import write_atomic, write_csv


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes atomically; reads tensors and plain values only, never pickled code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomic(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is damaged or no checkpoint of ercn") from error


class EpochLog(pl.Callback):
    """Writes metrics.csv, one row an epoch, and prints a line where there is no progress bar.

    The rows are part of the checkpoint, so a resumed run continues them without a gap or a duplicate.
    """

    def __init__(self, path: Path, *, lines: bool) -> None:
        self.path, self.lines, self.rows = path, lines, []
        self.extra: dict[str, float] = {}  # added to this epoch's row by an earlier callback

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())} | self.extra
        self.extra = {}
        seconds = round(time.perf_counter() - self.start, 2)
        place = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        rate = trainer.optimizers[0].param_groups[0]["lr"]  # of the next step
        row = {**place, **metrics, "lr": rate, "seconds": seconds}
        self.rows.append(row)
        if trainer.is_global_zero:
            write_csv(self.path, self.rows)
            if self.lines:
                values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                print(f"epoch {row['epoch']}/{trainer.max_epochs}  {values}  {seconds:.1f} s", flush=True)


class WeightAverage(EMAWeightAveraging):
    """Moving average of all weights and statistics, on the model's device; checkpoints hold both.

    Their ``state_dict`` is the average, so that the export is what validation measured.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the model moves there later
        super().setup(trainer, pl_module, stage)


def checkpoints(folder: Path, monitor: str | None) -> list[ModelCheckpoint]:
    """best.ckpt by the highest ``monitor`` (unless None), then last.ckpt, each written once an epoch."""
    shared = {"dirpath": folder, "save_on_train_epoch_end": True, "enable_version_counter": False, "save_top_k": 1}
    last = ModelCheckpoint(filename="last", every_n_epochs=1, **shared)
    return [ModelCheckpoint(filename="best", monitor=monitor, mode="max", **shared), last] if monitor else [last]
