"""What of the pool's later arguments a backend takes: dropout, activations, weights in another dtype than h."""

from __future__ import annotations

from collections.abc import Sequence


def refusal(
    op: str, args: tuple, *, dropout: bool = False, activations: Sequence[str] = ("tanh",), mixed: bool = False
) -> str | None:
    """Why a backend with no more than this cannot take ``args`` of ``op``, in a sentence, or None."""
    if op not in ("gated_attention_pool", "gated_attention_pool_backward", "attention_scores"):
        return None
    h, v_weight, *_, seed, dropout_p, activation = args[2:14] if op.endswith("backward") else args[:12]
    if seed is not None and not dropout:
        return f"it has no dropout; got dropout_p = {dropout_p}"
    if activation not in activations:
        return f"its activations are {', '.join(activations)}; got {activation}"
    if h.dtype != v_weight.dtype and not mixed:
        return f"it takes weights in h's dtype {h.dtype}; got {v_weight.dtype}"
    return None
