"""Every CPU kernel once, on sizes that are no multiple of any tile: what ``make valgrind`` runs."""

import torch

from ercn.ops import attention_scores, gated_attention_pool, pool_by_scores, relu_affinity

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    value, feat = torch.randn(1, 3, 101), torch.randn(1, 5, 101).to(dtype).requires_grad_()
    relu_affinity(value.requires_grad_(), feat, backend="cpu").sum().backward()

    h = torch.randn(2, 7, 9).to(dtype).requires_grad_()
    v, u, w = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((5, 9), (5, 9), (2, 5)))
    pooled, scores = gated_attention_pool(h, v, None, u, None, w, None, backend="cpu")
    (pooled.sum() + scores.sum()).backward()

    options = {"dropout_p": 0.5, "activation": "gelu", "backend": "cpu"}
    mask = torch.rand(2, 7) < 0.7
    pooled, scores = gated_attention_pool(h, v, None, u, None, w, None, mask=mask, masked_score=0.0, **options)
    value = torch.randn(2, 7, 3).to(dtype).requires_grad_()
    alone = attention_scores(h, v, None, None, None, w, None, **options)
    other = pool_by_scores(alone, value, mask=mask, backend="cpu")
    (pooled.sum() + scores.sum() + other.sum()).backward()

h = torch.randn(2, 7, 9).bfloat16().requires_grad_()
v, w = (torch.randn(*shape).requires_grad_() for shape in ((5, 9), (2, 5)))
gated_attention_pool(h, v, None, None, None, w, None, activation="relu", backend="cpu")[0].sum().backward()
