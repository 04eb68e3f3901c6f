"""Checks a variant's output: its error against float64 beside that of the eager version in the same dtype.

The rule for ours is that of the operators' tests (``ercn.ops._budget``), of whole tensors.
Baselines are not ours to repair and may add n terms in any order: √n ulps of float32 more, what a running sum of n
terms of one sign may lose (the roundings are as good as random: Higham and Mary 2019, doi 10.1137/18M1226312).
torch.compile needs it on the CPU: it adds the N rows of relu(FᵀF) one after the other where eager adds in pairs. At N
3136 its degrees are those of such a loop to the last bit, 2.1e-6 off instead of 2.5e-7, and so its outputs are 2.1e-6
off (eager 4.2e-7, our rule 1.9e-6) and its gradients 8.7e-6 (eager 1.2e-6, our rule 3.4e-6); √n ulps are 6.7e-6.
Forward outputs are compared on the data that is timed, gradients on kink-safe data of the same shape (see
``AffinityCase.inputs``), since one pair of pixels that rounding moves across ReLU's kink changes a gradient by far more
than rounding does. Of the network, the logits and refined CAM of inference are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ercn.benchmarks import network
from ercn.benchmarks.cases import DTYPES, Case, Inputs, ModelCase
from ercn.benchmarks.settings import precision
from ercn.benchmarks.variants import Variant, variants
from ercn.ops import _budget

EAGER_LIMIT = 0.1  # the largest error of the judge itself


@dataclass(frozen=True)
class Verdict:
    """error and judge_error are relative to the largest exact value; reason is None where the output is right."""

    error: float
    judge: str
    judge_error: float
    reason: str | None


class Judge:
    """The exact results of a case, and the error of ``name``: eager, or a blockwise version where it does not fit."""

    def __init__(self, case: Case, device: str, name: str) -> None:
        self.case, self.device, self.name = case, device, name
        table = {v.name: v for v in variants(case, device)}
        self.exact = _outputs(table["ercn-reference"], case, device, torch.float64)
        self.error = self._error(table[name])

    def _error(self, variant: Variant) -> float:
        outputs = _outputs(variant, self.case, self.device, None)
        if [x.shape for x in outputs] != [x.shape for x in self.exact]:
            return float("inf")
        largest = max(e.abs().max().item() for e in self.exact)
        return max(_budget.error(a, e, largest=largest) for a, e in zip(outputs, self.exact))

    def verdict(self, variant: Variant) -> Verdict:
        error = self.error if variant.name == self.name else self._error(variant)
        if variant.name == self.name:
            limit = EAGER_LIMIT
        else:
            limit = _budget.allowed(self.error, DTYPES[self.case.dtype])
            if variant.role == "baseline":
                limit += self.case.size**0.5 * torch.finfo(torch.float32).eps
        wrong = not error <= limit
        reason = f"wrong output: error {error:.1e}, allowed {limit:.1e}" if wrong else None
        return Verdict(error, self.name, self.error, reason)


def _outputs(variant: Variant, case: Case, device: str, dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs, and with a backward the gradients too; in ``dtype`` instead of the case's where given."""
    forward = replace(case, direction="forward")
    if isinstance(case, ModelCase):
        if dtype is not None:
            forward = replace(forward, dtype="float32")
        data = network.inputs(forward, device, dtype or torch.float32)
        return [x.double() for x in variant.make(forward, data)()]
    kink_safe = case.direction != "forward"
    data = case.inputs(device, kink_safe=kink_safe)
    if dtype is not None:
        tensors = tuple(x.to(dtype) if x.is_floating_point() else x for x in data.tensors)
        data = Inputs(tensors, data.upstream.to(dtype))
    with precision(case.dtype):
        outputs = list(variant.make(forward, data)())
        if kink_safe:
            outputs += variant.make(replace(case, direction="forward_backward"), data)()
    return [x.double() for x in outputs]
