"""The small U-Net (Ronneberger et al. 2015) of lesion masks, the supervised ceiling of every heat map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.checkpoint import check_state, load_weights

LEVELS_DOWN = 3  # halvings
PRIOR = -4.0  # initial bias: the logit of a share of lesion pixels of about 2 %


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, twice."""
    parts = []
    for channels in (inputs, outputs):
        parts += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """Logits of a lesion at each pixel: [B, 3, H, W] -> [B, H, W], any size; at ``width`` 16 it has 0.49 M parameters.

    width: channels at full resolution, doubled by each of three halvings. Pictures are padded to a multiple of 8 by
    their last row and column.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS_DOWN + 1)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([3, *widths], widths))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.head.bias, PRIOR)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = F.pad(image, (0, -width % 2**LEVELS_DOWN, 0, -height % 2**LEVELS_DOWN), mode="replicate")
        seen = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            seen.append(x)
        for skip, block in zip(seen[-2::-1], reversed(self.up)):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2)], 1))
        return self.head(x)[:, 0, :height, :width]


@dataclass(frozen=True)
class Ceiling:
    """The trained U-Net: pictures [B, 3, S, S], normalised with ``info["mean"]`` and ``info["std"]``, to the
    probability of a lesion at each pixel, float32 [B, S, S] on the device. info: ceiling.json."""

    network: UNet
    info: dict[str, Any]

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        return self.network(image).sigmoid()


def load_ceiling(run: str | Path, device: torch.device | str = "cpu") -> Ceiling:
    """The U-Net that ``train_ceiling`` exported into the run folder, for inference on ``device``.

    Raises FileNotFoundError naming a file that is missing, ValueError naming one that is damaged.
    """
    folder = Path(run) / "export"
    needed = ("width", "image_size", "mean", "std", "normalize", "manifest", "val_aupr")
    state, info = load_weights(folder, "ceiling", "ercn ceiling", needed)
    network = UNet(info["width"])
    check_state(network, state, str(folder / "ceiling.safetensors"), f"a U-Net of width {info['width']}")
    network.load_state_dict(state)
    return Ceiling(network.to(device).eval(), info)
