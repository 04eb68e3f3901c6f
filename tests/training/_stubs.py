"""Networks whose maps are known (how green the picture is, seen through a tent), and what an export says of itself."""

import torch
import torch.nn.functional as F

from ercn.checkpoint import RunInfo
from ercn.config import ModelConfig, TrainConfig
from ercn.elements import exact_side, resize
from ercn.models import ERCNOutput


def info_of(config: TrainConfig, **changes) -> RunInfo:
    """Of a network that was never trained, for pictures of 64 px."""
    about = {"class_names": list("abcde"), "trained_classes": list("abcde"), "image_size": 64, "prepared_size": 64}
    about |= {"mean": [0.5] * 3, "std": [0.2] * 3, "manifest": "0" * 64, "thresholds": {"referable": 0.5, "maps": {}}}
    return RunInfo(config=config, **about | changes)


class Tents(torch.nn.Module):
    """Each element of the maps is a weighted sum of pixels around it; the weights fall linearly to 0 at its neighbours.

    This is the transpose of bilinear interpolation: a green spot keeps its sum and its centre of mass, to rounding, at
    any place. stride 1 is the picture itself.
    """

    config = ModelConfig(refinement=())

    def __init__(self, stride, align_corners):
        super().__init__()
        self.stride, self.align_corners = stride, align_corners
        last = stride - 1 if align_corners or stride == 1 else stride - 0.5  # the tent's last pixel
        self.tent = 1 - torch.arange(-last, last + 1).abs() / stride

    def forward(self, image, *, refine=True, pamr=True):
        size = [exact_side(side, self.stride, self.align_corners) for side in image.shape[2:]]
        image = resize(image, size, self.align_corners)
        green = (image[:, 1:2] - image[:, :1] - 0.1).clamp_min(0)  # more than JPEG's noise
        kernel = self.tent[:, None] * self.tent / self.tent.sum() ** 2
        padding = (len(self.tent) - (1 if self.align_corners else self.stride)) // 2
        seen = F.conv2d(green, kernel[None, None], stride=self.stride, padding=padding)
        cam = seen.expand(-1, 4, -1, -1)
        logits = torch.full((len(image), 4), 9.0)
        refined = torch.cat([1 - seen, cam], 1)
        return ERCNOutput(logits, logits, logits, cam, refined, seen, torch.log(seen + 1e-6))
