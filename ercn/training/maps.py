"""Heat maps of a model output on one fixed scale [0, 1], so that pictures, maps and runs can be compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ercn.config import ModelConfig
from ercn.models import ERCNOutput, grade_probabilities

NAMES = {"cam": "CAM", "refined_cam": "refined CAM", "attention": "attention"}
_EPS = 1e-5


def heat_maps(output: ERCNOutput, config: ModelConfig) -> dict[str, Tensor]:
    """Maps [B, h, w] in [0, 1], float32 on the CPU, by the names of ``NAMES``; "attention" only where the model pools.

    cam, refined_cam: max_k p_k · c_k over the foreground channels; c_k is the channel in [0, 1] (the raw CAM after
    ReLU, divided by its maximum in the picture; the refined CAM as it is) and p_k the probability of the channel
    (sigmoid of its logit; softmax with "onehot"), so that a picture graded healthy stays cold.
    attention: softmax over the elements, mean over heads, divided by its maximum; relative within one picture.
    """
    logits = output.logits.float()
    onehot = config.targets == "onehot"
    probability = grade_probabilities(logits, config)[:, 1:] if onehot else logits.sigmoid()  # [B, F]
    cam = output.cam.float().relu()
    cam = cam / (cam.amax((2, 3), keepdim=True) + _EPS)
    maps = {
        name: (probability[:, :, None, None] * channels).amax(1)
        for name, channels in (("cam", cam), ("refined_cam", output.refined_cam[:, 1:].float()))
    }
    if output.attention is not None:
        attention = output.attention.float().flatten(2).softmax(-1).view_as(output.attention).mean(1)
        maps["attention"] = attention / attention.amax((1, 2), keepdim=True)
    return {name: heat.clamp(0, 1).cpu() for name, heat in maps.items()}


def enlarge(heat: Tensor, size: int) -> Tensor:
    """Bilinear [B, h, w] -> [B, size, size]; stays in [0, 1]."""
    return F.interpolate(heat[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)
