"""A pixel correlation module (PCM) of the SEAM family, replaced in one line.

The network below refines its class activation maps by ``self.pcm(cam, f)``, written in plain torch with the N × N
affinity of the N = h·w positions. ``ercn.ops.affinity_propagate`` takes the same arguments and gives the same maps and
gradients without that matrix.

    python examples/seam_pcm.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.ops import affinity_propagate


def plain_pcm(cam: Tensor, f: Tensor) -> Tensor:
    """cam [B, C, h, w] through the affinity relu(f̂ᵀ f̂) of f [B, D, h, w], its columns divided by their sums."""
    f = f.flatten(2)
    f = f / (f.norm(dim=1, keepdim=True) + 1e-5)
    affinity = F.relu(f.transpose(1, 2) @ f)  # [B, N, N]
    affinity = affinity / (affinity.sum(1, keepdim=True) + 1e-5)
    return (cam.flatten(2) @ affinity).view_as(cam)


class Network(nn.Module):
    """A backbone of two convolutions, maps of its features, and their refinement."""

    def __init__(self, classes: int = 4, width: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.classifier = nn.Conv2d(width, classes, 1, bias=False)
        self.embed = nn.Conv2d(width + 3, 16, 1, bias=False)
        self.pcm = plain_pcm

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(image)
        cam = self.classifier(features)
        small = F.interpolate(image, cam.shape[2:], mode="bilinear", align_corners=True)
        f = self.embed(torch.cat([small, features.detach()], 1))
        return cam, self.pcm(cam.relu(), f)


def step(network: Network, image: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The refined maps, and the gradients of a loss on both maps."""
    cam, refined = network(image)
    loss = F.multilabel_soft_margin_loss(cam.mean((2, 3)), labels) + (cam.relu() - refined).abs().mean()
    return refined.detach(), torch.autograd.grad(loss, list(network.parameters()))


def main() -> float:
    """The largest difference of maps and gradients, each relative to the largest value."""
    torch.manual_seed(0)
    network, image = Network(), torch.rand(2, 3, 128, 96)
    labels = torch.randint(0, 2, (2, 4)).float()
    plain, plain_gradients = step(network, image, labels)
    network.pcm = affinity_propagate  # the one line
    fused, fused_gradients = step(network, image, labels)
    pairs = [(plain, fused), *zip(plain_gradients, fused_gradients)]
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"maps and gradients differ by at most {difference:.1e} of their largest value")
    return difference


if __name__ == "__main__":
    main()
