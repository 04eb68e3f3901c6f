"""A CLAM-style network with dropout inside its attention, trained through ``ercn`` and beside it in plain torch.

Bags go through a linear layer, gated attention with a branch for each class, and a classifier for each class; the
instances of highest and lowest attention train an instance classifier (after Lu et al., 2021). The twin has the same
weights, and the same dropout masks by ``ercn.ops.reference.dropout_factors``. Both have the same losses.

    python examples/clam_style.py
"""

import copy

import torch
from torch import Tensor, nn

from ercn.nn import GatedAttentionPool
from ercn.ops.reference import dropout_factors

DIM, HIDDEN, CLASSES, DROPOUT, DTYPE = 32, 48, 2, 0.25, torch.float64


class PlainAttention(nn.Module):
    """Gated attention under CLAM's names; ``factors`` are what dropout multiplies its two branches by."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Sigmoid())
        self.attention_c = nn.Linear(HIDDEN, CLASSES)

    def forward(self, h: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores = self.attention_c(self.attention_a(h) * factors[0] * self.attention_b(h) * factors[1]).T
        return scores.softmax(1) @ h, scores


class Network(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention = nn.Sequential(nn.Linear(16, DIM), nn.ReLU()), attention
        self.classifiers = nn.ModuleList(nn.Linear(DIM, 1) for _ in range(CLASSES))
        self.instance_classifiers = nn.ModuleList(nn.Linear(DIM, 2) for _ in range(CLASSES))

    def loss(self, bag: Tensor, label: int, *factors: tuple[Tensor, Tensor], k: int = 8) -> Tensor:
        h = self.embed(bag)
        pooled, scores = self.attention(h, *factors)  # [CLASSES, DIM] and [CLASSES, N]
        logits = torch.cat([classify(z) for classify, z in zip(self.classifiers, pooled)])
        order = scores[label].argsort()
        instance_logits = self.instance_classifiers[label](h[torch.cat([order[-k:], order[:k]])])
        instance_loss = nn.functional.cross_entropy(instance_logits, torch.tensor([1] * k + [0] * k))
        return 0.7 * nn.functional.cross_entropy(logits, torch.tensor(label)) + 0.3 * instance_loss


def main() -> list[tuple[float, float]]:
    """The losses of 60 steps, through ``ercn`` and in plain torch."""
    torch.manual_seed(0)
    twin = Network(PlainAttention()).to(DTYPE)
    network = copy.deepcopy(twin)
    network.attention = GatedAttentionPool.from_state_dict(twin.attention.state_dict(), dropout=DROPOUT)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (network, twin)]
    bags, losses = [torch.randn(40 + 3 * i, 16, dtype=DTYPE) for i in range(20)], []
    for i, bag in enumerate(bags):
        bag[:6, i % 2] += 3  # a few instances make the class
    for step in range(60):
        bag, label = bags[step % 20], step % 2
        torch.manual_seed(step)
        seed = torch.randint(2**62, (1,))  # as ``ercn`` draws it
        factors = dropout_factors(seed, DROPOUT, torch.arange(len(bag)), HIDDEN, DTYPE)
        torch.manual_seed(step)
        pair = network.loss(bag, label), twin.loss(bag, label, factors)
        for optimizer, loss in zip(optimizers, pair):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((pair[0].item(), pair[1].item()))
    difference = max(abs(a - b) for a, b in losses)
    print(f"loss {losses[0][0]:.3f} to {losses[-1][0]:.3f}; the plain twin's differs by at most {difference:.1e}")
    return losses


if __name__ == "__main__":
    main()
