"""``ercn ablate``: trains and evaluates the cells of a grid, each once, and writes their table.

out/data/<hash>/      the prepared pictures, where the grid makes them
out/pretrain/<hash>/  pre-training runs, shared by the cells that start from them
out/cells/<hash>/     one training run each; test.npz and test.json are its results on the test split
out/ceiling/<hash>/   the U-Net that is trained on masks, where the grid wants one, and its results
out/*/<hash>.txt      the output of the run, and the traceback where it failed
out/ablation.*        the table of the finished cells as JSON, CSV and Markdown, and the figure

``ercn select`` (``selection``) runs the same cells and writes val.npz and val.json beside these.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ercn._environment import package_versions
from ercn._files import read_json, write_atomic, write_json
from ercn.ablation import table as ablation_table
from ercn.ablation.grid import Cell, Grid, ceiling_config, cells, digest, grid_config, load_grid, prepare_config
from ercn.checkpoint import RunInfo, check_state, load_model, without_pretrained
from ercn.config import AblateConfig, CeilingConfig, PretrainConfig, TrainConfig
from ercn.data import DataError, Manifest, prepare
from ercn.data.loading import load_manifest, make_loader, need_split
from ercn.evaluation.calibration import temper
from ercn.evaluation.collecting import add_picture, collect, masks_of, with_masks
from ercn.evaluation.evaluating import check_normalization, choose_on_validation, ground_of
from ercn.evaluation.filters import FILTERS
from ercn.evaluation.infer import pick_device
from ercn.evaluation.localization import ALL, Localization, level_counts
from ercn.evaluation.unet import load_ceiling
from ercn.models import ERCN
from ercn.training.ceiling import train_ceiling
from ercn.training.fit import train
from ercn.training.pretraining import pretrain


def ablate(config: AblateConfig) -> Path:
    """Runs the unfinished cells of the grid, seeds outermost, and writes the table; returns its Markdown file.

    A cell that fails is printed by name, the others go on, and the table leaves it out. A second start keeps finished
    cells and tries failed ones again. A kill loses no more than the current epoch. Raises ValueError for an
    inconsistent grid, before anything runs, and at the end where cells failed, naming them.
    """
    grid, out = load_grid(config.grid), Path(config.out)
    write = partial(ablation_table.write, grid, out=out, draws=config.bootstrap)
    return run_cells(grid, out, "test", lambda planned, about: write(planned, about=about))


def run_cells(
    grid: Grid,
    out: Path,
    split: str,
    write: Callable[[Mapping[tuple[str, int], Cell], dict[str, Any]], Path],
) -> Path:
    """Runs the unfinished cells of the grid, with results on ``split``, then ``write``, whose file it returns.

    write: gets the cells and a description of the data (``ablation_table.write``). Only pictures of train, val and
    ``split`` are read. Interruptions, failed cells and errors are handled as ``ablate`` says.
    """
    manifest = _data(grid, out, split)
    planned = cells(grid, out, str(manifest.root), manifest.hash)
    ceiling = _ceiling_of(grid, out, manifest)
    about = _about(manifest, split) | {"ceiling": ceiling and str(ceiling.folder)}
    names: dict[Path, str] = {}  # by cell, after the first row that has it
    for (row, seed), cell in planned.items():
        names.setdefault(cell.folder, f"{row}, seed {seed}")
    todo = list({cell.folder: cell for cell in planned.values()}.values())
    failed: dict[str, str] = {}
    try:
        for waiting in (False, True):  # the second pass waits for the cells of other processes, in case one dies
            for number, cell in enumerate(todo, 1):
                name = names[cell.folder]
                with _claimed(cell.folder, waiting) as mine:
                    if mine and name not in failed and not (cell.folder / f"{split}.json").is_file():
                        print(f"[{number}/{len(todo)}] {name}", flush=True)
                        if error := _attempt(cell.folder, lambda cell=cell: _run(cell, manifest, split)):
                            failed[name] = error
                            print(f"failed: {error}; {cell.folder}.txt", flush=True)
        if ceiling is not None:
            with _claimed(ceiling.folder, wait=True):
                if not (ceiling.folder / f"{split}.json").is_file():
                    print("supervised ceiling", flush=True)
                    _run_ceiling(ceiling, manifest, split, grid_config(grid))
    finally:
        table = write(planned, about)
    print(table.read_text(encoding="utf-8"), flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(todo)} cells failed; run again to try them: {'; '.join(failed)}")
    return table


def _about(manifest: Manifest, split: str) -> dict[str, Any]:
    """Data set, hash and numbers of the pictures; of the phantom also how they are drawn."""
    settings = read_json(manifest.root / "prepare.json")["settings"]
    keys = ("size", *(("seed", "patients", "difficulty") if manifest.dataset == "phantom" else ()))
    return {
        "dataset": manifest.dataset,
        "manifest": manifest.hash,
        "prepare": {key: settings[key] for key in keys},
        "split": split,
        "pictures": {name: len(manifest.split(name)) for name in dict.fromkeys(("train", "val", split))},
    }


def _data(grid: Grid, out: Path, split: str) -> Manifest:
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
    for name in ("train", "val", split):
        need_split(manifest, name, str(manifest.root))
    return manifest


def _attempt(folder: Path, run: Callable[[], None]) -> str | None:
    """Calls ``run``, which fills the folder; returns its error as a sentence, or None."""
    try:
        run()
    except Exception as error:  # noqa: BLE001  the other cells go on
        with _log(folder):
            print(traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # trainers are cycles, and hold the decoded pictures
    return None


def _run(cell: Cell, manifest: Manifest, split: str) -> None:
    """Pre-trains and trains where that is not done, then evaluates; the split's JSON, written last, marks the end."""
    if cell.pretrain is not None:
        _pretrain(cell.pretrain)
    with _log(cell.folder):
        if cell.weights is not None:
            model, info = _reuse(cell, manifest)
        else:
            if not (cell.folder / "cost.json").is_file():
                cost = _Cost()
                train(cell.config)
                write_json(cell.folder / "cost.json", cost.seconds())
            model, info = load_model(cell.folder)
        if None in (info.flat_cam, info.contrast):
            raise ValueError(f"{cell.folder} was trained by an older version of ercn; remove it to train it again")
        collected = collect(model, info, manifest.split(split))
    cell.folder.mkdir(exist_ok=True)
    arrays = {
        "probability": temper(collected.probability, info.temperature),
        "truth": ground_of(info, manifest).truth(collected.grade),
        **_measured(collected.localization, collected.patients, manifest, split),
    }
    about = {"config": asdict(cell.config)}
    about |= {key: getattr(info, key) for key in ("thresholds", "contrast", "flat_cam")}
    _write_results(cell.folder, split, arrays, about | {"unreadable": collected.unreadable})


def _measured(local: Localization, patients: list[str], manifest: Manifest, split: str) -> dict[str, np.ndarray]:
    """What the table needs of the maps: histograms for all lesions together, levels of the marks, and mean heat."""
    if not local.patients:
        raise ValueError(f"{manifest.root} has no lesion masks in its {split} split, and the table is about them too")
    lesions = local.counts[ALL]
    arrays = {
        "patients": np.array(patients),
        "owners": np.array(local.owners),
        "lesion_rows": np.array(lesions.rows),
        "lesions": np.array(lesions.lesions),
        "healthy_rows": np.array(local.healthy.rows, int),
    }
    for name in lesions.histograms:
        arrays[f"counts_{name}"] = np.stack(lesions.histograms[name])
        for key, levels in (("found", lesions.found[name]), ("marks", local.marks[name])):
            arrays[f"{key}_{name}"] = level_counts(levels).astype(np.int32)
        arrays[f"heat_{name}"] = np.array(local.healthy.heat.get(name, []))
    return arrays


def _write_results(folder: Path, split: str, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    write_atomic(folder / f"{split}.npz", lambda path: np.savez_compressed(path, **arrays))
    write_json(folder / f"{split}.json", about | {"packages": package_versions()})


@dataclass(frozen=True)
class _Ceiling:
    """The U-Net that is trained on masks: the folder of its run, its configuration where the grid trains it, and the
    folder of its results."""

    run: Path
    config: CeilingConfig | None
    folder: Path


def _ceiling_of(grid: Grid, out: Path, manifest: Manifest) -> _Ceiling | None:
    """None where the grid has none; raises where its folder or options are wrong."""
    if grid.ceiling is None:
        return None
    config = ceiling_config(grid, out, str(manifest.root), manifest.hash)
    if config is not None:
        return _Ceiling(Path(config.run.out), config, Path(config.run.out))
    info = load_ceiling(grid.ceiling).info
    check_normalization(info["normalize"], manifest)
    return _Ceiling(Path(grid.ceiling), None, out / "ceiling" / digest([info, manifest.hash]))


def _run_ceiling(ceiling: _Ceiling, manifest: Manifest, split: str, base: TrainConfig) -> None:
    """Trains it where that is not done, and measures its maps like those of the cells."""
    with _log(ceiling.folder):
        if ceiling.config is not None and not (ceiling.run / "export" / "ceiling.json").is_file():
            train_ceiling(ceiling.config)
    device = pick_device(base.run.accelerator)
    network = load_ceiling(ceiling.run, device)
    mean, std, size = (network.info[key] for key in ("mean", "std", "image_size"))
    records, config = manifest.split(split), replace(base.data, image_size=size)
    pictures = with_masks(records, mean, std, config)
    local, read = Localization(), []
    for batch in filter(None, make_loader(pictures, config.batch_size, config.workers)):  # None: all are unreadable
        heat = network(batch["image"].to(device)).cpu().numpy()
        for own, (index, masks) in zip(heat, masks_of(batch, pictures)):
            add_picture(local, {"supervised": own}, masks, records[index])
            read.append(records[index].patient)
    ceiling.folder.mkdir(exist_ok=True)
    about = {"run": str(ceiling.run), "image_size": size, "thresholds": {"maps": {}}}
    _write_results(ceiling.folder, split, _measured(local, read, manifest, split), about)


def _reuse(cell: Cell, manifest: Manifest) -> tuple[ERCN, RunInfo]:
    """This cell's model with the weights of another one, and thresholds of its own."""
    with _claimed(cell.weights, wait=True):  # another process may be training that cell
        trained, info = load_model(cell.weights)
    model = ERCN(without_pretrained(cell.config).model)
    state = trained.state_dict()
    check_state(model, state, str(cell.weights), "the options of this row describe, which has train: false")
    model.load_state_dict(state, strict=True)
    info = replace(info, config=cell.config)
    filters = [info.contrast] if info.contrast else FILTERS
    return model, choose_on_validation(info, collect(model, info, manifest.split("val"), filters=filters), manifest)


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
    """Seconds since its creation: CPU time (of this process and the loaders that ended) and wall time."""

    def __init__(self) -> None:
        self.cpu, self.wall = sum(os.times()[:4]), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        cpu, wall = sum(os.times()[:4]) - self.cpu, time.perf_counter() - self.wall
        return {"cpu": round(cpu, 1), "wall": round(wall, 1)}


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[None]:
    """Appends standard output to a file beside the run's folder."""
    with open(f"{folder}.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


@contextlib.contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone holds ``folder``, by a lock file that even a killed process releases."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
