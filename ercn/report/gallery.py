"""Pictures with their maps and lesion masks, as files beside the evaluation for the reports."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ercn.data import Record
from ercn.data.entries import OPTIC_DISC
from ercn.report.overlay import outlines, save_jpeg

MOST = 10  # pictures in a gallery


@dataclass
class Shown:
    """row: index in the collected pictures. picture: uint8 [S, S, 3]. maps: [S, S] in [0, 1]. masks: bool [S, S]."""

    row: int
    picture: np.ndarray
    maps: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]


def gallery_choice(records: Sequence[Record]) -> list[int]:
    """Indices of at most ``MOST`` pictures: of every grade in turn, those with lesion masks first."""
    queues: dict[int, list[int]] = {}
    for i in sorted(range(len(records)), key=lambda i: not records[i].masks):
        queues.setdefault(-1 if records[i].grade is None else records[i].grade, []).append(i)
    rounds = max((len(q) for q in queues.values()), default=0)
    return [queues[g][r] for r in range(rounds) for g in sorted(queues, reverse=True) if r < len(queues[g])][:MOST]


def as_picture(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the normalisation: [3, S, S] -> [S, S, 3] uint8."""
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
    return ((image * scale + shift).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def write_gallery(folder: Path, shown: Sequence[Shown], texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Writes ``NN_picture.jpg``, ``NN_<map>.png`` (grey: 255 is heat 1) and ``NN_lesions.png`` (outlines).

    Returns an entry for each picture: its text, "lesions" that it has, and "panels", its files. The files have numbers,
    not ids: reports are passed on more easily than data sets.
    """
    for old in (path for suffix in ("jpg", "png") for path in folder.glob(f"*.{suffix}")):
        old.unlink()
    entries = []
    for number, (item, text) in enumerate(zip(shown, texts), 1):
        files = {"picture": f"{number:02d}_picture.jpg"}
        save_jpeg(folder / files["picture"], item.picture)
        for name, heat in item.maps.items():
            files[name] = f"{number:02d}_{name}.png"
            Image.fromarray(np.round(heat * 255).astype(np.uint8)).save(folder / files[name])
        present = {kind: mask for kind, mask in item.masks.items() if mask.any()}
        if present:
            files["lesions"] = f"{number:02d}_lesions.png"
            Image.fromarray(outlines(present)).save(folder / files["lesions"])
        panels = {name: f"{folder.name}/{file}" for name, file in files.items()}
        entries.append({**text, "lesions": [kind for kind in present if kind != OPTIC_DISC], "panels": panels})
    return entries


def key_of(manifest: str, id: str) -> str:
    """A key that distinguishes pictures without revealing their names."""
    return hashlib.sha256(f"{manifest}/{id}".encode()).hexdigest()[:12]
