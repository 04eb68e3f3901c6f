"""PAMR inside a training loop: a network learns from its own maps, drawn to the edges of the picture.

In each step the class activation map is refined by ``ercn.nn.PixelAdaptiveRefinement``, without a gradient; where the
refined map is high or low it is a pseudo mask, on which the network is trained beside the image labels (after Araslanov
and Roth, CVPR 2020). The pictures are random: a bright or a dark disc on a noisy background.

    python examples/pamr_loop.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.nn import PixelAdaptiveRefinement


def random_pictures(count: int, size: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, size, size], the masks of their discs, and whether each disc is bright."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    cy, cx, radius = (torch.randint(low, high, (count, 1, 1)) for low, high in ((12, 28), (12, 28), (6, 11)))
    disc = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    bright = torch.randint(0, 2, (count,)).bool()
    shade = torch.where(bright, 0.35, -0.35)[:, None, None] * disc
    return (0.5 + shade[:, None] + 0.05 * torch.randn(count, 3, size, size)).clamp(0, 1), disc, bright


def pseudo_mask(cam: Tensor) -> Tensor:
    """1 where a map [B, H, W] from 0 to 1 is high, 0 where it is low, and 255, ignored, between."""
    return torch.where(cam > 0.5, 1.0, torch.where(cam < 0.25, 0.0, 255.0))


def overlap(cam: Tensor, disc: Tensor) -> float:
    """IoU of the disc and of the map above half of its largest value."""
    found = cam > 0.5
    return float((found & disc).sum() / (found | disc).sum())


def main() -> tuple[list[float], float, float]:
    """The losses of 50 steps, and the overlap (IoU) of disc and map before and after the refinement."""
    torch.manual_seed(0)
    image, disc, bright = random_pictures(12)
    network = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 2, 1)
    )
    refine = PixelAdaptiveRefinement(dilations=(1, 2, 4, 8), steps=10)
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.005), []
    for step in range(50):
        logits = network(image - 0.5)
        highest = logits.flatten(2).topk(10).values.mean(2)  # a disc is small
        loss = F.multilabel_soft_margin_loss(highest, F.one_hot(bright.long(), 2).float())
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)
        own = logits[range(len(image)), bright.long()]  # the map of the picture's class
        if step >= 20:  # from then on the refined maps teach too
            cam = own.detach().relu() / own.detach().amax((1, 2), keepdim=True).clamp(min=1e-5)
            refined = refine(cam[:, None], image)[:, 0]
            target = pseudo_mask(refined)
            sure = target < 255
            loss = loss + F.binary_cross_entropy_with_logits(own[sure], target[sure])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    overlaps = overlap(cam, disc), overlap(refined, disc)
    print(f"loss {losses[20]:.3f} when the pseudo masks come in, {losses[-1]:.3f} at the end")
    print(f"IoU of disc and map {overlaps[0]:.2f}, refined {overlaps[1]:.2f}")
    return losses, *overlaps


if __name__ == "__main__":
    main()
