"""Heat maps of a model output on one fixed scale [0, 1], so that pictures, maps and runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ercn.config import ModelConfig
from ercn.elements import resize
from ercn.models import ERCNOutput, activation, channel_probabilities

NAMES = {
    "cam": "CAM",
    "refined_cam": "refined CAM",
    "attention": "attention",
    "evidence": "attention × CAM",
    "mean": "mean map",
}
LOST = 0.5  # a network has lost its CAM where more than this share of the val pictures with disease have a flat one
_EPS = 1e-5


def maps_of(config: ModelConfig) -> list[str]:
    """Names of the maps that a model has: "attention" where it pools; "evidence" where it also is not "separate"."""
    absent = ["evidence"] * (config.evidence == "separate") + ["attention", "evidence"] * (config.pool == "none")
    return [name for name in NAMES if name not in absent]


def heat_maps(output: ERCNOutput, config: ModelConfig, align_corners: bool) -> dict[str, Tensor]:
    """Maps [B, h, w] in [0, 1], float32 on the CPU, by the names of ``maps_of``.

    cam: max_k p_k · c_k over the foreground channels; c_k is the channel's evidence (``ercn.models.activation``)
        divided by its maximum in the picture, and p_k the probability of the channel (sigmoid of its logit; softmax
        with "onehot"), so that a picture graded healthy stays cold.
    refined_cam: the same of the refined CAM, on its own grid.
    attention: softmax over the elements, mean over heads, divided by its maximum; relative within one picture.
    evidence: as cam, of attention times the CAM's evidence. The sum of attention times CAM over the elements is the
        MIL logit without its bias.
    mean: of these, on the finest grid, elements where ``align_corners`` says.
    """
    logits = output.logits.float()
    probability = channel_probabilities(logits, config)[:, :, None, None]

    def heat(channels: Tensor) -> Tensor:
        return (probability * channels / (channels.amax((2, 3), keepdim=True) + _EPS)).amax(1)

    cam, refined = activation(output.cam.float(), config.cam_pool), output.refined_cam[:, 1:].float()
    maps, names = {"cam": heat(cam), "refined_cam": heat(refined)}, maps_of(config)
    if "attention" in names:
        weight = output.attention.float().flatten(2).softmax(-1).view_as(output.attention)
        attention = weight.mean(1)
        maps["attention"] = attention / attention.amax((1, 2), keepdim=True)
    if "evidence" in names:
        maps["evidence"] = heat(cam if config.evidence == "additive" else weight * cam)
    grid = max(tuple(heat.shape[-2:]) for heat in maps.values())
    maps["mean"] = torch.stack([resize(heat[:, None], grid, align_corners)[:, 0] for heat in maps.values()]).mean(0)
    return {name: heat.clamp(0, 1).cpu() for name, heat in maps.items()}


def flat(cam: Tensor, config: ModelConfig) -> Tensor:
    """Whether a CAM points at nothing, bool [B]: in no channel does the evidence's maximum exceed its mean by a tenth.

    This holds where the CAM is nowhere positive ("relu"), and where it is constant.
    """
    evidence = activation(cam.float(), config.cam_pool)
    low, high = evidence.mean((2, 3)), evidence.amax((2, 3))
    return ((high - low) <= 0.1 * high).all(1)


def extent(cam: Tensor, config: ModelConfig) -> Tensor:
    """How much of the map a CAM covers, [B]: the share of elements with more than half of the largest evidence.

    The evidence of an element is its largest over channels. 0 where the CAM is nowhere positive ("relu"), 1 where it is
    constant.
    """
    evidence = activation(cam.float(), config.cam_pool).amax(1)
    return (evidence > evidence.amax((1, 2), keepdim=True) / 2).float().mean((1, 2))


def merge(outputs: Sequence[tuple[ERCNOutput, bool]], align_corners: bool) -> ERCNOutput:
    """Merges the outputs of several views of the same pictures; True marks a view that was mirrored left to right.

    After SEAM's inference: CAM, refined CAM and attention are means over the views, mirrored back and resized to the
    grid of the largest one, bilinear, elements where ``align_corners`` says. The attention's mean is taken of densities
    (softmax) and returned as a logarithm. Everything else comes from the first view.
    """
    first = outputs[0][0]

    def mean(name: str) -> Tensor:
        views = [(getattr(output, name).float(), mirrored) for output, mirrored in outputs]
        if name == "attention":
            views = [(scores.flatten(2).softmax(-1).view_as(scores) * scores[0, 0].numel(), m) for scores, m in views]
        grid = max(tuple(view.shape[-2:]) for view, _ in views)
        upright = (view.flip(-1) if mirrored else view for view, mirrored in views)
        return sum(resize(view, grid, align_corners) for view in upright) / len(views)

    attention = None if first.attention is None else mean("attention").clamp_min(1e-30).log()
    return first._replace(cam=mean("cam"), refined_cam=mean("refined_cam"), attention=attention)


def enlarge(heat: Tensor, size: int, align_corners: bool) -> Tensor:
    """Bilinear [B, h, w] -> [B, size, size], the pixels of the picture; stays in [0, 1]."""
    return resize(heat[:, None], (size, size), align_corners)[:, 0].clamp(0, 1)


def ceiling_of(mask: np.ndarray, grid: Sequence[int], align_corners: bool) -> np.ndarray:
    """The best that a map of ``grid`` elements can show of a mask bool [S, S]: its share in each element, [S, S]."""
    share = resize(torch.from_numpy(mask)[None, None].float(), grid, align_corners, antialias=True)
    return enlarge(share[0], len(mask), align_corners)[0].numpy()
