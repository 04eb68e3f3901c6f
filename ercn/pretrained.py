"""Weights of a backbone from a run's folder or a file, in published layouts.

It reads exports of ``ercn pretrain`` and ``ercn train`` (the run's folder, or the file) and files of weights,
.safetensors or what ``torch.load`` reads without running code. Layouts are timm's, torchvision's (ResNet, DenseNet,
RegNet, EfficientNet, ConvNeXt, Swin, ViT) and that of masked autoencoders (RETFound), which is timm's with a decoder.
A prefix of the names (``module.``, ``model.``, ``teacher.backbone.``, ``encoder_q.`` …) is found by itself. Position
embeddings and tables of relative positions of another size are interpolated as timm does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ENOUGH = 0.9  # share of the tensors of a backbone that a file must have
_PREFERRED = ("ema", "teacher", "encoder_q", "online")  # where a file has several networks
_UNREAD = "num_batches_tracked"  # old files lack it and no network reads it
_OURS = {"format", "notice", "packages"}  # keys of every export's description

_SE = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}
# Layers of torchvision's EfficientNet in timm's names: blocks of the first stage, and of the others.
_DEPTHWISE = {"0.0": "conv_dw", "0.1": "bn1", "2.0": "conv_pw", "2.1": "bn2"} | {f"1.{k}": v for k, v in _SE.items()}
_INVERTED = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "3.0": "conv_pwl", "3.1": "bn3"}
_INVERTED |= {f"2.{k}": v for k, v in _SE.items()}
# Patterns that turn torchvision's names into timm's, applied in order.
_TORCHVISION = {
    "RegNet": (
        (r"\bstem\.0\.", "stem.conv."),
        (r"\bstem\.1\.", "stem.bn."),
        (r"\btrunk_output\.block\d+\.block(\d+)-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
        (r"\.proj\.", ".downsample."),
        (r"\.f\.([abc])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}."),
        (r"\.f\.se\.", ".se."),
        (r"(\.downsample|\.conv\d)\.0\.", r"\1.conv."),
        (r"(\.downsample|\.conv\d)\.1\.", r"\1.bn."),
    ),
    "EfficientNet": (
        (r"\bfeatures\.0\.0\.", "conv_stem."),
        (r"\bfeatures\.0\.1\.", "bn1."),
        (
            r"\bfeatures\.(\d+)\.(\d+)\.block\.(\d\.\w+)\.",
            lambda m: f"blocks.{int(m[1]) - 1}.{m[2]}.{(_DEPTHWISE if m[1] == '1' else _INVERTED).get(m[3], m[3])}.",
        ),
    ),
    "ConvNeXt": (
        (r"\bfeatures\.0\.", "stem."),
        (r"\bfeatures\.(\d*[13579])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
        (r"\bfeatures\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"\.layer_scale$", ".gamma"),
    ),
    "Swin": (
        (r"\bfeatures\.0\.0\.", "patch_embed.proj."),
        (r"\bfeatures\.0\.2\.", "patch_embed.norm."),
        (r"\bfeatures\.(\d*[13579])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
        (r"\bfeatures\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    ),
    "ViT": (
        (r"\bconv_proj\.", "patch_embed.proj."),
        (r"\bclass_token$", "cls_token"),
        (r"\bencoder\.pos_embedding$", "pos_embed"),
        (r"\bencoder\.layers\.encoder_layer_", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        (r"\bencoder\.ln\.", "norm."),
    ),
}


@dataclass(frozen=True)
class Loaded:
    """What was loaded from a file.

    source: the file. sha256: its hash. layout: whose names it has. prefix: of the names. tensors: how many were loaded.
    missing: tensors that the file lacks, which stay as initialised. resized: interpolated tensors, with both shapes.
    unused: part of the file's network to the number of its tensors that the backbone does not have.
    """

    source: str
    sha256: str
    layout: str
    prefix: str
    tensors: int
    missing: tuple[str, ...]
    resized: dict[str, str]
    unused: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"missing": list(self.missing)}

    def __str__(self) -> str:
        below = f", below {self.prefix!r}" if self.prefix else ""
        parts = [f"backbone: {self.tensors} tensors of {self.source} ({self.layout} layout{below})"]
        if self.resized:
            parts.append(f"interpolated: {_some([f'{key} {shapes}' for key, shapes in self.resized.items()])}")
        if self.missing:
            parts.append(f"{len(self.missing)} not in the file, as drawn: {_some(self.missing)}")
        if self.unused:
            parts.append(f"not used: {_some([f'{part} ({count})' for part, count in self.unused.items()], 8)}")
        return "; ".join(parts)


def load_pretrained(backbone: nn.Module, path: str | Path, name: str) -> Loaded:
    """Loads weights of ``path`` into a backbone of ``ercn.models.create_backbone``, timm's ``name``.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no export.
        ValueError: the file is damaged, needs code to be run, or is the export of another backbone; it lacks the first
            layer, or more than 1 - ``ENOUGH`` of the tensors (an export: any tensor); weights are integers, complex,
            sparse, without values or not finite; or shapes do not fit. The message has examples of names or shapes.
    """
    file = _find(Path(path))
    command, origin = _described(file)
    if origin is not None and origin != name:
        raise ValueError(
            f"{path} holds a pre-trained {origin}, but model.backbone is {name}; "
            f"set --model.backbone {origin} or pre-train {name}"
        )
    given = dict(_tensors(_read(file)))
    own = backbone.state_dict()
    layout, prefix, found = _matched(given, own)
    needed = [key for key in own if not key.endswith(_UNREAD)]
    missing = tuple(key for key in needed if key not in found)
    unused = [key for key in given if key not in found.values()]
    few = len(missing) > (0 if command else (1 - ENOUGH) * len(needed))
    first = next(key for key in needed if own[key].ndim > 1 and key.endswith("weight"))
    if few or first in missing:
        there = f"{len(needed) - len(missing)} are there" + ("" if few else ", but not the first layer's")
        rest = _some([key or "a tensor without a name" for key in unused])
        raise ValueError(
            f"{file} does not hold the weights of {name}: of {len(needed)} tensors that it needs, {there}. "
            f"It needs, for one, {_some(missing)}; the file has {rest or ('nothing else' if given else 'no tensors')}"
        )
    state, resized, faults, misfits = {}, {}, [], []
    for key, source in found.items():
        if fault := _fault(given[source], own[key].dtype):
            if not key.endswith(_UNREAD):
                faults.append(f"{source} {fault}")
            continue
        value = _fitted(key, given[source].to(own[key].dtype), own[key], backbone)
        if value is None:
            misfits.append(f"{source} {list(given[source].shape)} instead of {list(own[key].shape)}")
        else:
            state[key] = value
            if value.numel() != given[source].numel():
                resized[key] = f"{list(given[source].shape)} to {list(value.shape)}"
    if faults:
        raise ValueError(f"{file} has tensors that cannot be weights of {name}, {len(faults)} in all: {_some(faults)}")
    if misfits:
        raise ValueError(
            f"{file} holds the weights of another model than {name}: "
            f"{len(misfits)} of another shape ({_some(misfits)})"
        )
    backbone.load_state_dict(state, strict=False)
    return Loaded(
        str(file), _hash(file), command or layout, prefix, len(state), missing, resized, _parts(unused, prefix)
    )


def _find(path: Path) -> Path:
    """The file of weights: ``path``, or in the folder ``path``."""
    if path.is_file():
        return path
    names = [f"{folder}{name}.safetensors" for folder in ("export/", "") for name in ("backbone", "model")]
    for name in names:
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise FileNotFoundError(f"{path} has no {' or '.join(names[:2])}; ercn pretrain or train writes it at its end")
    raise FileNotFoundError(f"{path} does not exist: give a run of ercn pretrain or ercn train, or a file of weights")


def _described(file: Path) -> tuple[str, str | None]:
    """The command that wrote an export, and its backbone; "" and None for other files, with a .json or without."""
    about = file.with_suffix(".json")
    if file.suffix.lower() != ".safetensors" or not about.is_file():
        return "", None
    try:
        info = json.loads(about.read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not info.keys() >= _OURS:
            return "", None
        if "backbone" in info:
            return "ercn pretrain", info["backbone"]
        return "ercn train", info["config"]["model"]["backbone"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{about} is damaged: {error!r}") from error


def _read(file: Path) -> Any:
    """The content of the file; no code of it runs."""
    if file.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain settings, in checkpoints of MAE
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file} cannot be read without running code that it brings"
            f"{f' ({reason[1]})' if reason else ''}, or is damaged; save its weights alone, with "
            "safetensors.torch.save_file or torch.save(model.state_dict(), …)"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _tensors(root: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested mappings and lists, keys and indices joined with dots; each container once."""
    seen: set[int] = set()
    left = [("", root)]
    while left:
        path, value = left.pop()
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            held = [(key, item) for key, item in items if isinstance(item, Tensor | Mapping | list | tuple)]
            left += reversed([(f"{path}.{key}" if path else str(key), item) for key, item in held])


def _matched(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str, dict[str, str]]:
    """Layout and prefix that match most tensors, and the names of ``own`` with their names in ``given``.

    timm's feature extractors put "model." before a network's names, or join "stages.0" to "stages_0".
    """
    inner = "model." if all(key.startswith("model.") for key in own) else ""
    plain = {key: _flat(key[len(inner) :]) for key in own}
    best: tuple[tuple[int, int], str, str, dict[str, str]] = ((-1, 0), "timm", "", {})
    for layout, rules in {"timm": (), **_TORCHVISION}.items():
        names: dict[str, str] = {}
        for key in given:
            name = key
            for pattern, new in rules:
                name = re.sub(pattern, new, name)
            names[name] = key
        flat = {_flat(name): name for name in names}
        for prefix in _prefixes(flat, plain):
            start = _flat(prefix)
            found = {key: names[flat[start + name]] for key, name in plain.items() if start + name in flat}
            rank = len(found), any(word in prefix for word in _PREFERRED)
            if rank > best[0]:
                best = rank, f"torchvision's {layout}" if rules else layout, prefix, found
    return best[1:]


def _prefixes(flat: Mapping[str, str], plain: Mapping[str, str]) -> list[str]:
    """Possible prefixes of the names, from a few of the names, in the order of the file."""
    some = list(plain.values())[:: max(1, len(plain) // 16)]
    found = {
        name[: len(name) - len(ending)]: None
        for key, name in flat.items()
        for ending in some
        if key.endswith(ending)
    }
    return [prefix for prefix in found if not prefix or prefix.endswith(".")]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _fault(value: Tensor, dtype: torch.dtype) -> str:
    """Why ``value`` of any shape cannot be a weight of ``dtype``; "" where it can."""
    if value.is_nested or value.layout != torch.strided:
        return f"is {'nested' if value.is_nested else value.layout}, not dense"
    if value.is_meta:
        return "has no values (device meta)"
    if value.is_floating_point() != dtype.is_floating_point:
        return f"is {value.dtype} instead of {dtype}"
    return "" if value.to(dtype).isfinite().all() else "has values that are not finite"


def _fitted(key: str, value: Tensor, own: Tensor, backbone: nn.Module) -> Tensor | None:
    """``value`` in the shape of ``own``, interpolated where it is of positions; None where it does not fit."""
    if value.shape == own.shape:
        return value
    if value.squeeze().shape == own.squeeze().shape:
        return value.reshape(own.shape)
    parent = backbone.get_submodule(key.rpartition(".")[0])
    grid = getattr(getattr(parent, "patch_embed", None), "grid_size", None)
    if key.endswith("pos_embed") and grid and value.ndim == own.ndim == 3 and value.shape[::2] == own.shape[::2]:
        from timm.layers import resample_abs_pos_embed

        prefix = own.shape[1] - grid[0] * grid[1]
        if side := _side(value.shape[1] - prefix):
            return resample_abs_pos_embed(value, grid, (side, side), prefix)
    if key.endswith("relative_position_bias_table") and value.ndim == own.ndim == 2 and value.shape[1] == own.shape[1]:
        from timm.layers import resize_rel_pos_bias_table_simple

        height, width = parent.window_size
        if _side(value.shape[0] - own.shape[0] + (2 * height - 1) * (2 * width - 1)):
            return resize_rel_pos_bias_table_simple(value, parent.window_size, own.shape)
    return None


def _side(count: int) -> int:
    """Side of the square grid of ``count`` positions; 0 where they are no square."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _parts(keys: list[str], prefix: str) -> dict[str, int]:
    """Number of tensors in each part, which is the first name after the prefix."""
    return dict(Counter(key.removeprefix(prefix).split(".")[0] for key in keys))


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _some(items: tuple[str, ...] | list[str], limit: int = 3) -> str:
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")
