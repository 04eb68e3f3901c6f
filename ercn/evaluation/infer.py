"""The forward passes of evaluation and prediction: plain torch, one device, every picture once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ercn.config import ModelConfig
from ercn.elements import resize
from ercn.maps import heat_maps, merge
from ercn.models import ERCN, ERCNOutput, grade_probabilities

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def pick_device(accelerator: str) -> torch.device:
    """The device of "cpu", "gpu" or "cuda", or "auto" (CUDA if available, else the CPU); ValueError for others."""
    if accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator must be one of {', '.join(ACCELERATORS)}; got {accelerator!r}")
    available = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not available:
        raise ValueError(f"accelerator {accelerator!r} was asked for, but torch finds none here")
    return torch.device("cuda" if available and accelerator != "cpu" else "cpu")


class Views(NamedTuple):
    """Sizes relative to the picture's at which maps are computed and averaged, and whether each is also mirrored."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


ONE_VIEW = Views()


@torch.inference_mode()
def forward(
    model: ERCN,
    config: ModelConfig,
    batches: Iterable[dict[str, Tensor] | None],
    device: torch.device,
    views: Views = ONE_VIEW,
) -> Iterator[tuple[dict[str, Tensor], np.ndarray, dict[str, Tensor]]]:
    """Per batch: the batch, probabilities [B, K] (float64, rows sum to 1) and heat maps {name: [B, h, w] in [0, 1]}.

    The probabilities are those of the unchanged picture, before calibration, whatever ``views``.
    """
    model.to(device).eval()
    for batch in batches:
        if batch is None:
            continue
        output = see(model, batch["image"].to(device, non_blocking=True), views)
        probability = grade_probabilities(output.logits.cpu().double(), config).numpy()
        yield batch, probability, heat_maps(output, config, model.align_corners)


def see(model: ERCN, image: Tensor, views: Views) -> ERCNOutput:
    """The model's output for pictures [B, 3, H, W] with the maps of all views merged; "pamr" refines the merged CAM."""
    if views == ONE_VIEW:
        return model(image)
    outputs = [(model(image, pamr=False), False)]
    for scale in views.scales:
        for mirrored in (False, True) if views.flip else (False,):
            if (scale, mirrored) != (1, False):
                view = image.flip(-1) if mirrored else image
                size = [round(scale * side) for side in view.shape[-2:]]
                view = resize(view, size, model.align_corners, antialias=True)
                outputs.append((model(view, pamr=False), mirrored))
    output = merge(outputs, model.align_corners)
    if "pamr" in model.config.refinement:
        output = output._replace(refined_cam=model.refine_to_edges(output.refined_cam, image))
    return output
