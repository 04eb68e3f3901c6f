"""The grid of ``ercn ablate`` and ``ercn select``: a YAML file of rows, each a training configuration, times seeds.

    seeds: [0, 1, 2, 3, 4]
    prepare: {dataset: phantom, size: 257, patients: 300, seed: 0}   # or give data.root among the options
    pretrain:
      simclr: {method: simclr, backbone: resnet10t, run.epochs: 10}
    preset: ercn
    options: {model.backbone: resnet10t, data.image_size: 257}
    choose: {kappa: 1.0, aupr_refined_cam: 1.0}              # ercn select: a weighted sum of columns of the table
    ceiling: {run.epochs: 40}                                # or the run folder of ercn ceiling
    rows:
      - {group: losses, name: CAM, options: {model.refinement: [], loss.er: 0, loss.ecr: 0}, pretrain: simclr}
      - {group: losses, name: + affinity, base: CAM, options: {model.refinement: [affinity]}, train: false}
      - {group: losses, name: + ER, base: + affinity, options: {loss.er: 1}}

Options have the names of the command line. A row's configuration is the preset, then the grid's options, then those of
its ``base`` and of the row itself; later ones win. Two rows of one configuration share their cells.

The choice of ``ercn select`` is measured by a second grid with another ``prepare.seed``: another phantom, with other
patients in every split, on which ``ercn ablate`` trains anew and measures the test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ercn.config import CeilingConfig, PrepareConfig, PretrainConfig, TrainConfig, from_dict, preset

T = TypeVar("T")
# Options of where and how a cell runs; they are not part of its identity.
_PLACE = (("run", "out"), ("run", "resume"), ("run", "progress"), ("data", "root"), ("data", "workers"))


@dataclass(frozen=True)
class Row:
    """name: unique. group: heading in the table. base: an earlier row that this one builds on and is compared with.
    preset: instead of the grid's. options: dotted names. pretrain: one of the grid's names, "" for none; by default
    that of the base. train: false evaluates the base's weights with the row's options, for options that change neither
    training nor the shapes of weights (mask, confidence, refinement and their settings).
    """

    name: str
    group: str = ""
    base: str | None = None
    preset: str | None = None
    options: dict = field(default_factory=dict)
    pretrain: str | None = None
    train: bool = True


@dataclass(frozen=True)
class Grid:
    """What the YAML file says; ``Row`` explains the rows.

    choose: weights of the columns (``ercn.ablation.table.COLUMNS``) whose sum ``ercn select`` maximises; negative for
    columns that should be small. ceiling: options of ``ercn ceiling`` for a U-Net that is trained once on the data, or
    the run folder of one; the picture size is that of the grid's options.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str = "ercn"
    prepare: dict = field(default_factory=dict)
    pretrain: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    choose: dict = field(default_factory=dict)
    ceiling: object = None

    def __post_init__(self) -> None:
        if not self.rows or not self.seeds:
            raise ValueError(f"rows and seeds must have at least one entry; got {len(self.rows)} and {len(self.seeds)}")
        if not isinstance(self.ceiling, (str, dict, type(None))):
            raise ValueError(f"ceiling must be a folder, or options of ercn ceiling; got {self.ceiling!r}")  # noqa: TRY004
        seen: set[str] = set()
        for row in self.rows:
            if row.name in seen:
                raise ValueError(f"rows: the name {row.name!r} is given twice")
            if row.base is not None and row.base not in seen:
                raise ValueError(f"rows: {row.name!r} builds on {row.base!r}, which is no earlier row")
            if not row.train and (row.base is None or row.pretrain is not None or row.preset):
                raise ValueError(f"rows: {row.name!r} is not trained, so it needs a base and no preset or pretrain")
            if row.pretrain and row.pretrain not in self.pretrain:
                raise ValueError(
                    f"rows: {row.name!r} wants the pre-training {row.pretrain!r}; there is {', '.join(self.pretrain)}"
                )
            seen.add(row.name)

    def chain(self, row: Row) -> list[Row]:
        """All rows that this one builds on, the first one first, then the row."""
        by_name = {other.name: other for other in self.rows}
        return [*(self.chain(by_name[row.base]) if row.base else []), row]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a configuration with its seed, the pre-training that it starts from, and the folder of the
    run whose weights it takes if it is not trained.
    """

    config: TrainConfig
    pretrain: PretrainConfig | None
    weights: Path | None

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)


def load_grid(name: str) -> Grid:
    """A grid from a YAML file, or the packaged one of that name. ValueError or FileNotFoundError says what is wrong."""
    folder = resources.files("ercn") / "configs" / "grids"
    packaged = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    file = folder / f"{name}.yaml" if name in packaged else Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"grid {name!r} is no file, and no packaged grid: {', '.join(packaged)}")
    try:
        return from_dict(Grid, yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def prepare_config(grid: Grid, out: Path) -> PrepareConfig | None:
    """How to prepare the grid's data below ``out``; None where the grid names a prepared folder."""
    if not grid.prepare:
        return None
    config = with_options(PrepareConfig(), grid.prepare, "prepare")
    return replace(config, out=str(out / "data" / digest(grid.prepare)))


def grid_config(grid: Grid) -> TrainConfig:
    """The configuration of a row without options: the grid's preset and options."""
    return with_options(preset(grid.preset), grid.options, "options")


def ceiling_config(grid: Grid, out: Path, root: str, manifest: str) -> CeilingConfig | None:
    """How to train the grid's U-Net below ``out``, if there is one to train. ValueError names a wrong option."""
    if not isinstance(grid.ceiling, dict):
        return None
    own = grid_config(grid)
    config = CeilingConfig(data=own.data, run=replace(CeilingConfig().run, accelerator=own.run.accelerator))
    config = with_options(config, grid.ceiling, "ceiling")
    config = _placed(config, config.run.seed, root)
    return _in_folder(config, out / "ceiling" / _digest(config, manifest))


def cells(grid: Grid, out: Path, root: str, manifest: str) -> dict[tuple[str, int], Cell]:
    """Every row and seed with its cell, seeds outermost, all checked: ValueError names the row and the option.

    root: the prepared folder. manifest: its hash. Folders are named by a hash of configuration and data, so a changed
    row is a new cell and an unchanged one is found again.
    """
    result: dict[tuple[str, int], Cell] = {}
    for seed in grid.seeds:
        for row in grid.rows:
            chain, where = grid.chain(row), f"row {row.name!r}"
            config = preset(next((r.preset for r in reversed(chain) if r.preset), grid.preset))
            for options in (grid.options, *(r.options for r in chain)):
                config = with_options(config, options, where)
            config = _placed(config, seed, root)
            name = next((r.pretrain for r in reversed(chain) if r.pretrain is not None), "")
            first = None
            if name:
                first = _placed(with_options(PretrainConfig(), grid.pretrain[name], f"pretrain {name!r}"), seed, root)
                first = _in_folder(first, out / "pretrain" / _digest(first, manifest))
                config = replace(config, init=first.run.out)
            weights = None
            if not row.train:
                base = result[row.base, seed]
                weights = base.weights or base.folder
            own = replace(config, init=Path(first.run.out).name if first else None)
            folder = out / "cells" / _digest(own, manifest, weights.name if weights else "")
            result[row.name, seed] = Cell(_in_folder(config, folder), first, weights)
    return result


def with_options(config: T, options: Mapping[str, Any], where: str) -> T:
    """``config`` with dotted options changed; ValueError begins with ``where``."""
    values = asdict(config)
    for key, value in options.items():
        *parents, name = str(key).split(".")
        part = values
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict) or name not in part:
            raise ValueError(f"{where}: {key} is no option of {type(config).__name__}")
        part[name] = value
    try:
        return from_dict(type(config), values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _placed(config: T, seed: int, root: str) -> T:
    run = replace(config.run, seed=seed, resume=True, progress=False)
    return replace(config, run=run, data=replace(config.data, root=root))


def _in_folder(config: T, folder: Path) -> T:
    return replace(config, run=replace(config.run, out=str(folder)))


def _digest(config: Any, *origin: str) -> str:
    values = asdict(config)
    for part, name in _PLACE:
        del values[part][name]
    return digest([type(config).__name__, values, *origin])


def digest(values: Any) -> str:
    """A folder name from a hash of JSON-ready values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
