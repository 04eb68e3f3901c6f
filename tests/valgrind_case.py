"""Every CPU kernel once, on sizes that are no multiple of any tile: what ``make valgrind`` runs."""

import torch

from ercn.ops import gated_attention_pool, relu_affinity

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    value, feat = torch.randn(1, 3, 101), torch.randn(1, 5, 101).to(dtype).requires_grad_()
    relu_affinity(value.requires_grad_(), feat, backend="cpu").sum().backward()

    h = torch.randn(2, 7, 9).to(dtype).requires_grad_()
    v, u, w = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((5, 9), (5, 9), (2, 5)))
    pooled, scores = gated_attention_pool(h, v, None, u, None, w, None, backend="cpu")
    (pooled.sum() + scores.sum()).backward()
