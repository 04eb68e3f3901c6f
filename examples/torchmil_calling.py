"""torchmil's calling rule over ``ercn``: ``forward(X, mask, return_att)`` with padded bags and a mask of 0 and 1.

``AttentionPool`` below takes the arguments and weights of ``torchmil.nn.AttentionPool`` and can stand in its place. As
there, z is [B, D], and the attention [B, N] is that before the softmax. A bag that is masked as a whole gives zeros.

    python examples/torchmil_calling.py
"""

import torch
from torch import Tensor, nn

from ercn.nn import GatedAttentionPool


class AttentionPool(GatedAttentionPool):
    def __init__(self, in_dim: int, att_dim: int = 128, act: str = "tanh", gated: bool = False) -> None:
        super().__init__(in_dim, att_dim, gated=gated, bias=(True, True, False), activation=act)

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False):
        pooled, scores = super().forward(X, mask)
        return (pooled[:, 0], scores[:, 0]) if return_att else pooled[:, 0]


class ABMIL(nn.Module):
    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.pool, self.classifier = AttentionPool(in_dim, 64, gated=True), nn.Linear(in_dim, 1)
        self.criterion = nn.BCEWithLogitsLoss()

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False):
        z, att = self.pool(X, mask, return_att=True)
        Y = self.classifier(z)[:, 0]
        return (Y, att) if return_att else Y


def random_bags(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded bags of 5 to 40 instances, their mask, and labels: 1 where the first instance is shifted."""
    sizes, labels = torch.randint(5, 41, (count, 1)), torch.randint(0, 2, (count,))
    mask = (torch.arange(40) < sizes).float()
    X = torch.randn(count, 40, dim) * mask[..., None]
    X[:, 0] += 2 * labels[:, None]
    return X, mask, labels


def main() -> list[float]:
    """The losses of 60 steps."""
    torch.manual_seed(0)
    model, (X, mask, Y) = ABMIL(16), random_bags(64, 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(60):
        loss = model.criterion(model(X, mask), Y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    Y_pred, att = model(X, mask, return_att=True)
    first = att.detach()[Y == 1].argmax(1).eq(0).float().mean()
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; {(Y_pred > 0).eq(Y == 1).float().mean():.0%} of the bags right")
    print(f"the shifted instance has the highest attention in {first:.0%} of the positive bags")
    return losses


if __name__ == "__main__":
    main()
