"""Scores and pooling apart: a top-k mask between them, and values that are not what was scored.

``MaskedTop`` drops a share of the instances of highest attention from each branch in training, so that attention
spreads (after Zhang et al., ECCV 2024, ACMIL). ``Additive`` pools the logits that a head of its own gives each
instance, so that an instance adds its attention times its logits to those of the bag (after Javed et al., NeurIPS
2022). ``GatedAttentionPool.scores`` is ``ercn.ops.attention_scores`` with the weights of the layer.

    python examples/topk_additive.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ercn.nn import GatedAttentionPool
from ercn.ops import pool_by_scores


class MaskedTop(nn.Module):
    def __init__(self, dim: int, branches: int = 3, top: int = 6, share: float = 0.5) -> None:
        super().__init__()
        self.attention, self.top, self.share = GatedAttentionPool(dim, 32, branches), top, share
        self.classifier = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """The logit of each branch, [K, 1]."""
        scores = self.attention.scores(h)
        if self.training:
            top = scores.topk(self.top).indices
            some = torch.rand(top.shape, device=h.device).argsort(1)[:, : int(self.share * self.top)]
            scores = scores.scatter(1, top.gather(1, some), -torch.inf)
        return self.classifier(pool_by_scores(scores, h))


class Additive(nn.Module):
    def __init__(self, dim: int, classes: int = 1) -> None:
        super().__init__()
        self.attention = GatedAttentionPool(dim, 32)
        self.head = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, h: Tensor) -> Tensor:
        """The logits of the bag, [1, classes]."""
        return pool_by_scores(self.attention.scores(h), self.head(h))

    def contributions(self, h: Tensor) -> Tensor:
        """What each instance adds to the logits, [N, classes]; their sum is the logits."""
        return self.attention.scores(h).softmax(1).T * self.head(h)


def main() -> tuple[dict[str, list[float]], Tensor, Tensor]:
    """The mean losses of 8 passes of either network, and logits and contributions of a bag."""
    torch.manual_seed(0)
    bags = [torch.randn(50, 12) for _ in range(40)]
    for bag in bags[::2]:
        bag[:8, 0] += 3  # 8 of the 50 instances make a bag positive
    losses = {}
    for network in (MaskedTop(12), Additive(12)):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        losses[type(network).__name__] = means = []
        for _ in range(8):
            total = 0.0
            for i, bag in enumerate(bags):
                logits = network(bag)
                loss = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, i % 2 == 0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            means.append(total / len(bags))
        print(f"{type(network).__name__}: loss {means[0]:.3f} to {means[-1]:.3f}")
    with torch.no_grad():
        logits, parts = network(bags[0]), network.contributions(bags[0])
    print(f"logit {logits.item():.3f}, of which the 8 instances add {parts[:8].sum():.3f}")
    return losses, logits, parts


if __name__ == "__main__":
    main()
