"""Heat maps of a model output on one fixed scale [0, 1], so that pictures, maps and runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ercn.config import ModelConfig
from ercn.models import ERCNOutput, grade_probabilities

NAMES = {"cam": "CAM", "refined_cam": "refined CAM", "attention": "attention", "mean": "mean map"}
_EPS = 1e-5


def heat_maps(output: ERCNOutput, config: ModelConfig) -> dict[str, Tensor]:
    """Maps [B, h, w] in [0, 1], float32 on the CPU, by the names of ``NAMES``; "attention" only where the model pools.

    cam, refined_cam: max_k p_k · c_k over the foreground channels; c_k is the channel (the raw CAM after ReLU) divided
        by its maximum in the picture, and p_k the probability of the channel (sigmoid of its logit; softmax with
        "onehot"), so that a picture graded healthy stays cold.
    attention: softmax over the elements, mean over heads, divided by its maximum; relative within one picture.
    mean: of these.
    """
    logits = output.logits.float()
    onehot = config.targets == "onehot"
    probability = grade_probabilities(logits, config)[:, 1:] if onehot else logits.sigmoid()  # [B, F]
    maps = {}
    for name, channels in (("cam", output.cam.float().relu()), ("refined_cam", output.refined_cam[:, 1:].float())):
        channels = channels / (channels.amax((2, 3), keepdim=True) + _EPS)
        maps[name] = (probability[:, :, None, None] * channels).amax(1)
    if output.attention is not None:
        attention = output.attention.float().flatten(2).softmax(-1).view_as(output.attention).mean(1)
        maps["attention"] = attention / attention.amax((1, 2), keepdim=True)
    maps["mean"] = torch.stack(list(maps.values())).mean(0)
    return {name: heat.clamp(0, 1).cpu() for name, heat in maps.items()}


def merge(outputs: Sequence[tuple[ERCNOutput, bool]]) -> ERCNOutput:
    """One output from several views of the same pictures, each with whether it was mirrored left to right.

    After SEAM's inference: CAM, refined CAM and attention are means over the views, mirrored back and resized to the
    grid of the largest one, bilinear. The attention's mean is that of densities (softmax), and back as a logarithm.
    Everything else is the first view's.
    """
    first = outputs[0][0]
    grid = max(tuple(output.cam.shape[-2:]) for output, _ in outputs)

    def mean(name: str) -> Tensor:
        views = [(getattr(output, name).float(), mirrored) for output, mirrored in outputs]
        if name == "attention":
            views = [(scores.flatten(2).softmax(-1).view_as(scores) * scores[0, 0].numel(), m) for scores, m in views]
        upright = (view.flip(-1) if mirrored else view for view, mirrored in views)
        return sum(F.interpolate(view, grid, mode="bilinear", align_corners=False) for view in upright) / len(views)

    attention = None if first.attention is None else mean("attention").clamp_min(1e-30).log()
    return first._replace(cam=mean("cam"), refined_cam=mean("refined_cam"), attention=attention)


def enlarge(heat: Tensor, size: int) -> Tensor:
    """Bilinear [B, h, w] -> [B, size, size]; stays in [0, 1]."""
    return F.interpolate(heat[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)
