"""Exported weights: ``export/model.safetensors`` beside ``export/model.json``. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ercn._environment import package_versions
from ercn._files import DISCLAIMER, read_json, write_atomic, write_json
from ercn.config import TrainConfig, from_dict
from ercn.elements import GEOMETRY
from ercn.models import ERCN

FORMAT = 1
# Options that models of geometry 1 did not have yet, as those models behave.
_MODEL_1 = {
    "cam_scale": 1.0,
    "evidence": "separate",
    "confidence": "relative",
    "refinement": ["affinity"],
    "refine_stride": 0,
}
_NEEDED = ("config", "class_names", "image_size", "prepared_size", "mean", "std", "manifest", "thresholds")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Description of an exported network: the fields of ``model.json``, in the file's order.

    config: of the training. geometry: version of the network's geometry (``ercn.elements.GEOMETRY``).
    class_names: classes of the model. trained_classes: grades of the training's data set.
    image_size, prepared_size: side of the network's pictures and of the prepared ones, pixels.
    mean, std: of the channels. normalize: of ``ercn prepare``. dataset, manifest: name and hash of the training's data.
    data: label column, and pictures, patients and grades of each split.
    pretrained: which weights the backbone started from (``ercn.pretrained``), None without a file of weights.
    unreadable: ``{"id", "reason"}`` of the training pictures that were skipped.
    epoch: of the weights. temperature, thresholds, contrast: what the validation split chose
        (``ercn.evaluation.evaluating.choose_on_validation``); contrast is None where no filter was tried yet.
    parameters: how many. flat_cam: share of the validation pictures with disease whose CAM is flat (``maps.flat``).
    packages: versions that wrote the file.

    A field that is None is not in the file.
    """

    config: TrainConfig
    geometry: int = GEOMETRY
    class_names: list[str]
    trained_classes: list[str]
    image_size: int
    prepared_size: int
    mean: list[float]
    std: list[float]
    normalize: str = "none"
    dataset: str = ""
    manifest: str
    data: dict[str, Any] | None = None
    pretrained: dict[str, Any] | None = None
    unreadable: list[dict[str, str]] = field(default_factory=list)
    epoch: int | None = None
    temperature: float = 1.0
    thresholds: dict[str, Any] = field(default_factory=dict)
    contrast: str | None = None
    parameters: int | None = None
    flat_cam: float | None = None
    packages: dict[str, str] = field(default_factory=package_versions)


def save_weights(folder: Path, name: str, state: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    """Writes ``folder/name.safetensors`` and ``folder/name.json`` atomically, the weights first."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    write_atomic(folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(
        folder / f"{name}.json",
        {"format": FORMAT, "notice": DISCLAIMER, "packages": package_versions(), **info},
    )


def load_weights(
    folder: Path, name: str, made_by: str, needed: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what ``save_weights`` wrote; the description has the keys ``needed``.

    Raises FileNotFoundError naming the missing file and ``made_by``, the command that writes it; ValueError naming the
    file where it is damaged, of a newer format or lacks a key.
    """
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    for path in (weights, description):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {made_by} writes it at its end")
    info = _description(description, needed)
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error


def _description(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise ValueError(f"{path} has format {found!r}; this version of ercn reads format {FORMAT}")
    if missing := [key for key in needed if key not in info]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return info


def check_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str, target: str) -> None:
    """Raises ValueError that lists missing and unexpected keys and other shapes when ``state`` is not ``module``'s."""
    own = module.state_dict()
    parts = []
    for title, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if keys:
            parts.append(f"{len(keys)} {title} ({_some(sorted(keys))})")
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if parts:
        raise ValueError(f"{source} holds the weights of another model than {target}: {'; '.join(parts)}")


def save_model(run: Path, model: ERCN, info: RunInfo) -> None:
    """Writes ``run/export/model.safetensors`` and ``.json``; the geometry is that of ``model``."""
    about = asdict(replace(info, geometry=model.geometry))
    about = {key: value for key, value in about.items() if value is not None}
    save_weights(run / "export", "model", model.state_dict(), about)


def load_model(run: str | Path) -> tuple[ERCN, RunInfo]:
    """The trained model of a run folder, in eval mode on the CPU, and its ``model.json``.

    Loading is strict: ValueError says which keys or shapes differ, and names the file where it is damaged;
    FileNotFoundError names a missing file.
    """
    folder = Path(run) / "export"
    state, description = load_weights(folder, "model", "ercn train", _NEEDED)
    info = _info(description, folder / "model.json")
    model = ERCN(without_pretrained(info.config).model, geometry=info.geometry)
    check_state(model, state, str(folder / "model.safetensors"), f"{info.config.model.backbone} of model.json")
    model.load_state_dict(state, strict=True)
    return model.eval(), info


def _info(values: dict[str, Any], path: Path) -> RunInfo:
    """Fields that older files of the format lack get the values that their models behave by."""
    values = {"packages": {}, "trained_classes": values["class_names"], "geometry": 1} | values
    if values["geometry"] not in range(1, GEOMETRY + 1):
        raise ValueError(f"{path} has geometry {values['geometry']!r}; this version of ercn reads 1 to {GEOMETRY}")
    saved = values["config"]
    if values["geometry"] == 1 and isinstance(saved, Mapping) and isinstance(saved.get("model"), Mapping):
        old = _MODEL_1 | saved["model"]
        if old.get("steps") == 0:
            old |= {"steps": 1, "refinement": []}
        saved = saved | {"model": old}
    values["config"] = from_dict(TrainConfig, saved, f"{path}: config")
    return RunInfo(**{f.name: values[f.name] for f in fields(RunInfo) if f.name in values})


def without_pretrained(config: TrainConfig) -> TrainConfig:
    """The same configuration without the backbone's published weights, which the loaded ones replace."""
    return replace(config, model=replace(config.model, pretrained=False))


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")
