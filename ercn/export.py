"""Export of a trained network for use without ercn: the program, its preprocessing, and a script that predicts."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ercn import standalone
from ercn._environment import package_versions
from ercn._files import DISCLAIMER, check_empty, write_json
from ercn.checkpoint import RunInfo, load_model
from ercn.config import ExportConfig, ModelConfig, PredictConfig
from ercn.evaluation.calibration import FLOOR
from ercn.maps import NAMES, heat_maps, maps_of
from ercn.models import ERCN, grade_probabilities
from ercn.ops import decompositions

FORMAT = 1  # of export.json
OPSET = 18
FILES = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.aoti.pt2"}
LEFT_OUT = (
    "overlays on the photographs (ercn predict --overlays)",
    "maps averaged over scales and mirrored pictures (ercn predict --scales --flip)",
    "other sides of the picture than image_size, to which the script resizes; GPUs",
)


class Predicting(nn.Module):
    """What ``ercn predict`` computes of prepared pictures, in one view.

    image float32 [B, 3, S, S] -> {"logits": float32 [B, F], "probability": float64 [B, K], calibrated, and, of each
    heat map of ``ercn.maps.heat_maps``, "map_<name>": float32 [B, h, w]}.
    """

    def __init__(self, model: ERCN, config: ModelConfig, temperature: float) -> None:
        super().__init__()
        self.model, self.config, self.temperature = model, config, temperature

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        output = self.model(image)
        probability = grade_probabilities(output.logits.double(), self.config)
        if self.temperature != 1:  # as ercn.evaluation.calibration.temper
            probability = (probability.clamp_min(FLOOR).log() / self.temperature).softmax(1)
        heats = heat_maps(output, self.config, self.model.align_corners)
        maps = {f"map_{name}": heat for name, heat in heats.items()}  # "mean" alone is an operator's name in ONNX
        return {"logits": output.logits, "probability": probability, **maps}


def export(config: ExportConfig) -> Path:
    """Writes the network of ``config.run`` for use without ``ercn`` into ``config.out``, and returns that folder.

    It then holds the network (``FILES``), export.json (preprocessing, temperature, thresholds, class names, shapes,
    what is left out; written last), predict.py, which predicts from picture files, and the run's model card if there is
    one. The network is ``Predicting`` in operators of torch or ONNX alone, for any number of pictures of that size.

    Raises:
        ValueError: ``out`` is not an empty folder; a network that cannot be exported; no compiler for "aoti".
        FileNotFoundError: a run without weights.
        ModuleNotFoundError: packages of the format that are not installed.
    """
    out = Path(config.out)
    check_empty(out)
    _check_tools(config.format)
    model, info = load_model(config.run)
    network = Predicting(model, info.config.model, info.temperature).eval()
    if config.format == "onnx":
        split_attention(network)
    program = exported_program(network, info.image_size)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as temporary:
        try:
            _WRITERS[config.format](program, Path(temporary) / FILES[config.format])
        except Exception as error:
            raise ValueError(f"{config.run} cannot be written as {config.format}: {_line(error)}") from error
        for path in Path(temporary).iterdir():  # beside model.onnx, torch writes model.onnx.data for large weights
            os.replace(path, out / path.name)
    shutil.copyfile(standalone.__file__, out / "predict.py")
    card = Path(config.run) / "export" / "model_card.md"
    if card.is_file():
        shutil.copyfile(card, out / card.name)
    write_json(out / "export.json", _describe(network, info, config.format, card.name if card.is_file() else None))
    return out


def split_attention(network: nn.Module) -> None:
    """Turns off timm's fused attention: ONNX has none, and later views expect its memory layout."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def exported_program(network: Predicting, side: int) -> torch.export.ExportedProgram:
    """``network`` in torch's own operators, for any number of pictures of this side; ValueError where that fails."""
    image = torch.zeros(2, 3, side, side)
    table = decompositions() | {torch.ops.aten.cummin.default: _running_minimum}
    try:
        with torch.no_grad():
            program = torch.export.export(network, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            return program.run_decompositions(table)
    except Exception as error:  # a backbone may run code that no graph can hold
        raise ValueError(f"backbone {network.config.backbone} cannot be exported: {_line(error)}") from error


def _describe(network: Predicting, info: RunInfo, format: str, card: str | None) -> dict[str, Any]:
    side = info.image_size
    with torch.no_grad():
        outputs = network(torch.zeros(1, 3, side, side))
    return {
        "format": FORMAT,
        "notice": DISCLAIMER,
        "packages": package_versions(("onnx", "onnxscript", "onnx-ir") if format == "onnx" else ()),
        "model_card": card,
        "class_names": info.class_names,
        "network": {
            "file": FILES[format],
            "format": format,
            "backbone": network.config.backbone,
            "input": {"image": ["batch", 3, side, side]},
            "outputs": {name: ["batch", *output.shape[1:]] for name, output in outputs.items()},
        },
        "preprocessing": {
            "max_pixels": PredictConfig().max_pixels,
            **{name: getattr(info, name) for name in ("prepared_size", "normalize", "image_size", "mean", "std")},
        },
        "temperature": info.temperature,
        "thresholds": info.thresholds,
        "maps": {
            "names": {name: NAMES[name] for name in maps_of(network.config)},
            "scale": [0, 1],
            "corners": side if network.model.align_corners else 0,
        },
        "manifest": info.manifest,
        "left_out": LEFT_OUT,
    }


def _check_tools(format: str) -> None:
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if format == "onnx" else []
    if absent:
        message = f"format onnx needs {' and '.join(absent)}: pip install 'ercn[export]'"
        raise ModuleNotFoundError(message, name=absent[0])
    compiler = os.environ.get("CXX", "g++")
    if format == "aoti" and shutil.which(compiler) is None:
        raise ValueError(f"format aoti needs a C++ compiler, and there is no {compiler}; CXX may name another")


def _running_minimum(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """aten.cummin along a short dimension, which ONNX does not have; the indices are not used."""
    lowest = list(x.unbind(dim))
    for i in range(1, len(lowest)):
        lowest[i] = torch.minimum(lowest[i - 1], lowest[i])
    values = torch.stack(lowest, dim)
    return values, torch.zeros_like(values, dtype=torch.int64)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    names = list(program.call_spec.out_spec.context)
    # optimize would drop + 1e-8, without which a division is not finite; ONNX Runtime optimizes on its own
    options = {"opset_version": OPSET, "dynamo": True, "optimize": False, "verbose": False}
    torch.onnx.export(program, input_names=["image"], output_names=names, **options).save(path, external_data=False)


def _write_aoti(program: torch.export.ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


_WRITERS = {"onnx": _write_onnx, "pt2": torch.export.save, "aoti": _write_aoti}


def _line(error: BaseException) -> str:
    """The first line of an error without colours; for an error of torch, which is pages long, that of its cause."""
    while type(error).__module__.startswith("torch.") and error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    return next(iter(text.splitlines()), "") or type(error).__name__
