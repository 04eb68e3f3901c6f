"""A run's folder, new or resumed with the same configuration, and the trainer that fills it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from ercn._environment import environment
from ercn._files import remove_temporary, write_json, write_text
from ercn.checkpoint import check_state
from ercn.config import RunConfig, flatten
from ercn.evaluation.infer import pick_device
from ercn.training.callbacks import EpochLog, SafeCheckpointIO, WeightAverage, checkpoints
from ercn.training.loaders import PictureData

# Options that a resumed run may change: where, how fast and how long it runs.
FREE = {"data.workers"} | {
    f"run.{name}" for name in ("out", "resume", "epochs", "devices", "num_nodes", "grad_checkpointing", "progress")
}


def open_run(config: Any) -> Path | None:
    """Makes ``config.run.out``, saves config.yaml and environment.json there, and finds the checkpoint to resume from.

    Returns None to start from the beginning. Raises ValueError where the folder is not empty and ``run.resume`` is off,
    where it is no run of ercn, or where its configuration differs in more than ``FREE``, naming the fields.
    """
    run = config.run
    out = Path(run.out)
    last = out / "checkpoints" / "last.ckpt"
    if rank_zero_only.rank == 0:
        if out.exists() and not out.is_dir():
            raise ValueError(f"run.out {out} is a file; give a folder")
        if out.is_dir() and any(out.iterdir()):
            _check_same(config, out)
        if run.resume and not last.exists():
            print(f"nothing to resume: {out} has no finished epoch; starting from the beginning", flush=True)
        remove_temporary(out)
        write_text(out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
        write_json(out / "environment.json", environment())
    return last if run.resume and last.exists() else None


def _check_same(config: Any, out: Path) -> None:
    if not config.run.resume:
        raise ValueError(
            f"run.out {out} is not empty, and nothing is overwritten: "
            "give another --run.out, or --run.resume true to go on with the run in it"
        )
    saved = out / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"run.resume: {out} holds no config.yaml, so it is no run of ercn; give another --run.out")
    try:
        old = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"run.resume: {saved} is damaged: {error}") from error
    new = flatten(plain(config))
    differing = [name for name in sorted((old.keys() | new.keys()) - FREE) if old.get(name) != new.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differing)
        raise ValueError(f"run.resume: {out} was started with another configuration: {changes}")


def plain(config: Any) -> dict[str, Any]:
    """Nested dicts with lists for tuples, as YAML gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def make_trainer(run: RunConfig, *, monitor: str | None) -> pl.Trainer:
    """Lightning's trainer for a run folder: metrics.csv, checkpoints, a progress bar on terminals, lines elsewhere.

    Raises ValueError naming devices and precision that are not available.
    """
    _quiet()
    out, bar = Path(run.out), run.progress and sys.stdout.isatty()
    devices, nodes = processes(run)
    callbacks: list[pl.Callback] = [EpochLog(out / "metrics.csv", lines=not bar)]
    if run.ema:
        callbacks.append(WeightAverage(decay=run.ema))
    callbacks += checkpoints(out / "checkpoints", monitor)
    if bar:
        callbacks.append(progress_bar())
    try:
        return pl.Trainer(
            accelerator="cuda" if pick_device(run.accelerator).type == "cuda" else "cpu",
            devices=devices,
            num_nodes=nodes,
            # a loss term of weight 0 leaves parameters without a gradient
            strategy="ddp_find_unused_parameters_true" if devices * nodes > 1 else "auto",
            precision=run.precision,
            max_epochs=run.epochs,
            accumulate_grad_batches=run.accumulate,
            gradient_clip_val=run.clip or None,
            callbacks=callbacks,
            plugins=[SafeCheckpointIO()],
            logger=False,
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        asked = f"run.accelerator {run.accelerator!r}, run.devices {run.devices}, run.precision {run.precision!r}"
        raise ValueError(f"{asked}: {error}") from error


def processes(run: RunConfig) -> tuple[int, int]:
    """Devices per node, and nodes: torchrun's in a process that it started, else the configuration's."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    return run.devices, run.num_nodes


def progress_bar() -> ProgressBar:
    return RichProgressBar(leave=True)


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: PictureData,
    checkpoint: Path | None,
    advice: Callable[[], str],
) -> bool:
    """Trains; returns whether this process exports the result. KeyboardInterrupt passes through.

    Raises MemoryError with ``advice`` where memory runs out; finished epochs are kept.
    """
    if checkpoint is not None:
        data.first_epoch = _finished_epochs(checkpoint, module)
        if trainer.is_global_zero:
            print(f"resuming after epoch {data.first_epoch}", flush=True)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SystemExit as error:  # Lightning turns Ctrl-C into exit(1)
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that took the memory
        try:
            advised = advice()
        except Exception as failed:  # noqa: BLE001  must not hide that memory ran out
            reason = ": ".join(filter(None, (type(failed).__name__, " ".join(str(failed).split()))))
            advised = f"what would fit could not be predicted ({reason})"
        raise MemoryError(f"out of memory in epoch {trainer.current_epoch + 1}: {advised}") from error
    return trainer.is_global_zero


def _out_of_memory(error: Exception) -> bool:
    """Recognised by its words where the CPU allocator or oneDNN raised it: they have no exception of their own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "could not create a memory")
    )


def _finished_epochs(checkpoint: Path, module: pl.LightningModule) -> int:
    """Raises ValueError naming the checkpoint where it does not fit ``module``."""
    saved = SafeCheckpointIO().load_checkpoint(checkpoint)
    if not isinstance(saved, dict) or not {"epoch", "state_dict"} <= saved.keys():
        raise ValueError(f"{checkpoint} is no checkpoint of a training run")
    check_state(module, saved["state_dict"], str(checkpoint), "this configuration describes")
    return int(saved["epoch"]) + 1


def _quiet() -> None:
    """Silences Lightning's advice about loggers, workers and devices; other warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*number of training batches.*",
        ".*when logging on epoch level in distributed setting.*",  # equal on all ranks or already joined
        ".*available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
