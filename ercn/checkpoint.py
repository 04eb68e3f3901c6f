"""Exported weights: ``export/model.safetensors`` beside ``export/model.json``. Nothing is pickled.

``model.json`` holds all that inference must repeat: the configuration, class names, channel statistics, picture size,
temperature, decision thresholds, and what the weights came from (hashes of manifest and split, package versions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
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
# Of models with geometry 1, which had no choice of these.
_MODEL_1 = {
    "cam_scale": 1.0,
    "evidence": "separate",
    "confidence": "relative",
    "refinement": ["affinity"],
    "refine_stride": 0,
}
_NEEDED = ("config", "class_names", "image_size", "prepared_size", "mean", "std", "manifest", "thresholds")


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
    info = read_json(description)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise ValueError(f"{description} has format {found!r}; this version of ercn reads format {FORMAT}")
    if missing := [key for key in needed if key not in info]:
        raise ValueError(f"{description} is damaged: it lacks {', '.join(missing)}")
    try:
        with safe_open(weights, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error


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


def save_model(run: Path, model: ERCN, config: TrainConfig, info: Mapping[str, Any]) -> None:
    """Writes ``run/export/model.safetensors`` and ``.json``. info: what ``load_model`` shall give back, JSON-ready."""
    about = {"config": asdict(config), "geometry": model.geometry}
    save_weights(run / "export", "model", model.state_dict(), about | info)


def load_model(run: str | Path) -> tuple[ERCN, dict[str, Any]]:
    """The trained model of a run folder, in eval mode on the CPU, and its ``model.json``.

    ``info["config"]`` is a ``TrainConfig``. Loading is strict: ValueError says which keys or shapes differ, and names
    the file where it is damaged; FileNotFoundError names a missing file.
    """
    folder = Path(run) / "export"
    state, info = load_weights(folder, "model", "ercn train", _NEEDED)
    # exports from before there was a choice
    info = {"normalize": "none", "temperature": 1.0, "trained_classes": info["class_names"], "geometry": 1} | info
    if info["geometry"] not in range(1, GEOMETRY + 1):
        raise ValueError(
            f"{folder / 'model.json'} has geometry {info['geometry']!r}; this version of ercn reads 1 to {GEOMETRY}"
        )
    saved = info["config"]
    if info["geometry"] == 1 and isinstance(saved, Mapping) and isinstance(saved.get("model"), Mapping):
        old = _MODEL_1 | saved["model"]
        if old.get("steps") == 0:
            old |= {"steps": 1, "refinement": []}
        saved = saved | {"model": old}
    info["config"] = from_dict(TrainConfig, saved, f"{folder / 'model.json'}: config")
    model = ERCN(without_pretrained(info["config"]).model, geometry=info["geometry"])
    check_state(model, state, str(folder / "model.safetensors"), f"{info['config'].model.backbone} of model.json")
    model.load_state_dict(state, strict=True)
    return model.eval(), info


def without_pretrained(config: TrainConfig) -> TrainConfig:
    """The same configuration without the backbone's published weights, which the loaded ones replace."""
    return replace(config, model=replace(config.model, pretrained=False))


def _some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")
