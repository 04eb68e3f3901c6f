"""``ercn ablate``: trains and evaluates the cells of a grid, each once, and writes their table.

out/data/<hash>/      the prepared pictures, where the grid makes them
out/pretrain/<hash>/  pre-training runs, shared by the cells that start from them
out/cells/<hash>/     one training run each; cell.npz and cell.json are its results on the test split
out/*/<hash>.txt      what the run printed, and why it failed
out/ablation.*        the table as JSON, CSV and Markdown, and the figure, of the cells that are finished
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ercn._files import write_atomic
from ercn.config import AblateConfig, PretrainConfig
from ercn.data import DataError, Manifest, prepare
from ercn.models import ERCN
from ercn.training import ablation_table
from ercn.training.calibration import temper
from ercn.training.checkpoint import load_model
from ercn.training.evaluation import Collected, choose_on_validation, collect, ground_of
from ercn.training.files import package_versions, write_json
from ercn.training.fit import train
from ercn.training.grid import Cell, Grid, cells, load_grid, prepare_config
from ercn.training.infer import pick_device
from ercn.training.localization import ALL
from ercn.training.pictures import load_manifest, need_split
from ercn.training.pretraining import pretrain


def ablate(config: AblateConfig) -> Path:
    """Runs what is not finished of the grid, seeds outermost, and writes the table; returns its Markdown file.

    A cell that fails is told by name, the others go on, and the table leaves it out; started again, failed cells are
    tried again and finished ones kept. Interrupted or killed, it loses no more than the epoch it was in. Raises
    ValueError for a grid that does not fit together, before anything runs, and at the end where cells failed, naming
    them.
    """
    grid, out = load_grid(config.grid), Path(config.out)
    manifest = _data(grid, out)
    planned = cells(grid, out, str(manifest.root), manifest.hash)
    names: dict[Path, str] = {}  # of each cell, after the first row that has it
    for (row, seed), cell in planned.items():
        names.setdefault(cell.folder, f"{row}, seed {seed}")
    todo = list({cell.folder: cell for cell in planned.values()}.values())
    failed: dict[str, str] = {}
    try:
        for waiting in (False, True):  # what another process is at is waited for in the end, in case it dies
            for number, cell in enumerate(todo, 1):
                name = names[cell.folder]
                with _claimed(cell.folder, waiting) as mine:
                    if mine and name not in failed and not (cell.folder / "cell.json").is_file():
                        print(f"[{number}/{len(todo)}] {name}", flush=True)
                        if error := _attempt(cell, manifest):
                            failed[name] = error
                            print(f"failed: {error}; {cell.folder}.txt", flush=True)
    finally:
        table = ablation_table.write(grid, planned, out, draws=config.bootstrap)
    print(table.read_text(encoding="utf-8"), flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} cells failed; run again to try them: {'; '.join(failed)}")
    return table


def _data(grid: Grid, out: Path) -> Manifest:
    config = prepare_config(grid, out)
    if config is None:
        manifest = load_manifest(grid.options.get("data.root", ""))
    else:
        with _claimed(Path(config.out), wait=True):
            try:
                manifest = load_manifest(config.out)
            except DataError:  # not there, or not finished
                prepare(config)
                manifest = load_manifest(config.out)
    for split in ("train", "val", "test"):
        need_split(manifest, split, str(manifest.root))
    return manifest


def _attempt(cell: Cell, manifest: Manifest) -> str | None:
    """Runs a cell; returns what went wrong, if something did."""
    try:
        _run(cell, manifest)
    except Exception as error:  # noqa: BLE001  whatever it is, the other cells go on
        with _log(cell.folder):
            print(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # trainers are cycles, and hold the decoded pictures
    return None


def _run(cell: Cell, manifest: Manifest) -> None:
    """Pre-trains where nobody has, trains, evaluates on test; cell.json comes last and says that all is there."""
    if cell.pretrain is not None:
        _pretrain(cell.pretrain)
    cost = _Cost()
    with _log(cell.folder):
        if cell.weights is None:
            train(cell.config)
            model, info = load_model(cell.folder)
        else:
            model, info = _reuse(cell, manifest)
        collected = _collect(model, info, manifest, "test")
    cell.folder.mkdir(exist_ok=True)
    local = collected.localization
    if not local.patients:
        raise ValueError(f"{manifest.root} has no lesion masks in its test split, and the table is about them too")
    arrays = {
        "probability": temper(collected.probability, info["temperature"]),
        "truth": ground_of(info, manifest).truth(collected.grade),
        "patients": np.array(collected.patients),
        "lesion_patients": np.array(local.patients, dtype=str),
        **{f"counts_{name}": np.stack(counts) for name, counts in local.counts[ALL].histograms.items()},
    }
    write_atomic(cell.folder / "cell.npz", lambda path: np.savez_compressed(path, **arrays))
    write_json(
        cell.folder / "cell.json",
        {
            "config": asdict(cell.config),
            "thresholds": info["thresholds"],
            "unreadable": collected.unreadable,
            "seconds": cost.seconds(),
            "packages": package_versions(),
        },
    )


def _reuse(cell: Cell, manifest: Manifest) -> tuple[ERCN, dict[str, Any]]:
    """The weights of another cell in this one's model, with thresholds of their own."""
    with _claimed(cell.weights, wait=True):  # another process may be training it
        trained, info = load_model(cell.weights)
    model = ERCN(cell.config.model)
    model.load_state_dict(trained.state_dict(), strict=True)
    info |= {"config": cell.config}
    return model, info | choose_on_validation(_collect(model, info, manifest, "val"), ground_of(info, manifest))


def _collect(model: ERCN, info: dict[str, Any], manifest: Manifest, split: str) -> Collected:
    config = info["config"]
    return collect(
        model,
        info,
        manifest.split(split),
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        device=pick_device(config.run.accelerator),
        progress=False,
        title="",
    )


def _pretrain(config: PretrainConfig) -> None:
    folder = Path(config.run.out)
    with _claimed(folder, wait=True):
        if (folder / "export" / "backbone.json").is_file():
            return
        print(f"pre-training: {config.method}, seed {config.run.seed}", flush=True)
        cost = _Cost()
        with _log(folder):
            pretrain(config)
        write_json(folder / "cost.json", cost.seconds())


class _Cost:
    """Seconds since it was made, of the processors (this process and the loaders that ended) and by the clock."""

    def __init__(self) -> None:
        self.cpu, self.wall = sum(os.times()[:4]), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        cpu, wall = sum(os.times()[:4]) - self.cpu, time.perf_counter() - self.wall
        return {"cpu": round(cpu, 1), "wall": round(wall, 1)}


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """What is printed goes to a file beside the run's folder."""
    with open(f"{folder}.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


@contextlib.contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone holds ``folder``; the lock beside it goes with the process, even when it is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
