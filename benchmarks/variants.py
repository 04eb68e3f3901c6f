"""The variants of a case: our backends, the baselines, and yardsticks that compute something else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ercn.benchmarks import eager, network
from ercn.benchmarks.cases import (
    CALLS,
    AffinityCase,
    Case,
    Inputs,
    ModelCase,
    OverheadCase,
    PoolCase,
    RefinementCase,
    WalkCase,
)
from ercn.benchmarks.settings import CUDA_SETTINGS, SETTINGS, Runner
from ercn.ops import (
    _backends,
    affinity_propagate,
    edge_affinity,
    gated_attention_pool,
    pixel_adaptive_refinement,
    random_walk,
    relu_affinity,
)

# The backend that settings apply to, and the settings, by device.
SETTABLE = {"cpu": ("ercn-cpu", SETTINGS), "cuda": ("ercn-cuda", CUDA_SETTINGS)}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    make: gives the timed function of case and inputs, which returns outputs or gradients.
    role: "ercn", "baseline" (the same result), or "yardstick" (other mathematics, so nothing to verify).
    flops: FLOPs that it executes, of the network with dense operators.
    bytes: memory that its call is known to need, 0 if little.
    held: memory that it keeps while other variants run.
    """

    name: str
    role: str
    make: Callable[[Case, Inputs], Runner]
    flops: Callable[[Case], int | None]
    bytes: Callable[[Case], float] = lambda case: 0.0
    held: Callable[[Case], float] = lambda case: 0.0
    backend: str = ""

    def obstacle(self, case: Case, inputs: Inputs) -> str | None:
        """The sentence why our backend cannot run the case, or None."""
        if not self.backend:
            return None
        row = _backends.named(self.backend, "backend")
        for op, args in arguments(case, inputs).items():
            if reason := row.can_run(op, *args):
                return f"backend {self.backend!r} cannot run {op}: {reason}"
        return None


def variants(case: Case, device: str, backend: str = "", also: Iterable[str] = ()) -> list[Variant]:
    """Baselines first. ``backend`` leaves only that one of ours; ``also`` repeats the compiled one so set."""
    ours = [row.name for row in _backends.TABLE if row.device in ("any", device)]
    if backend:
        ours = [backend]
    build = {
        AffinityCase: _affinity_variants,
        PoolCase: _pool_variants,
        RefinementCase: _refinement_variants,
        WalkCase: _walk_variants,
        ModelCase: _model_variants,
        OverheadCase: _overhead_variants,
    }
    rows = build[type(case)](case, ours)
    settable, settings = SETTABLE[device]
    own = next((v for v in rows if v.name == settable), None)
    names = [name for name in also if own is not None and name != case.dtype]
    return rows + [replace(own, name=f"{own.name}@{name}", make=settings[name](own.make)) for name in names]


def arguments(case: Case, inputs: Inputs) -> dict[str, tuple[Tensor | None, ...]]:
    """Arguments of each op in the case; value has no row of ones yet and the case's dtype."""
    match case:
        case AffinityCase():
            return {"relu_affinity": inputs.tensors}
        case PoolCase(layout="ragged"):
            *tensors, bounds = inputs.tensors
            return {"gated_attention_pool": (*tensors, None, bounds, None, 0.0, "tanh")}
        case PoolCase():
            return {"gated_attention_pool": (*inputs.tensors, None, None, None, 0.0, "tanh")}
        case RefinementCase():
            return {"pixel_adaptive_refinement": inputs.tensors}
        case WalkCase():
            return {"random_walk": inputs.tensors}
        case ModelCase():
            return network.arguments(case, inputs)
        case OverheadCase():
            return arguments(case.inner, inputs)


def inputs_of(case: Case, device: str) -> Inputs:
    return network.inputs(case, device) if isinstance(case, ModelCase) else case.inputs(device)


def _in_direction(function: Callable[..., Tensor]) -> Callable[[Case, Inputs], Runner]:
    """The timed part of a differentiable function: its value, its backward, or both."""

    def make(case: Case, inputs: Inputs) -> Runner:
        if case.direction == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (function(case, *inputs.tensors),)

            return forward
        tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs.tensors]
        leaves = [x for x in tensors if x.requires_grad]
        if case.direction == "backward":
            out = function(case, *tensors)
            return lambda: torch.autograd.grad(out, leaves, inputs.upstream, retain_graph=True)
        return lambda: torch.autograd.grad(function(case, *tensors), leaves, inputs.upstream)

    return make


@cache
def _compiled(function: Callable) -> Callable:
    """Compiled once for all shapes. Donated buffers would forbid timing one graph's backward repeatedly."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns where there is no GPU
    return torch.compile(function, dynamic=True)


def _eager_affinity_flops(case: AffinityCase) -> int:
    forward, backward = case.dim + case.maps, 2 * (case.dim + case.maps)
    depth = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[case.direction]
    return 2 * case.batch * case.pixels**2 * depth


def _blockwise_affinity_flops(case: AffinityCase) -> int:
    again = 0 if case.direction == "forward" else 2 * case.batch * case.pixels**2 * (case.dim + case.maps)
    return _eager_affinity_flops(case) + again


def _triangle_affinity_flops(case: AffinityCase) -> int:
    """Each pair of pixels once, serving both: T and the rank-2C product W over half of the pairs, in full depth V·A (in
    the backward G·A) and F·W. What tiles on the diagonal compute twice is not counted.
    """
    rows = case.maps + 1  # with the row of ones
    forward, backward = case.dim + 2 * rows, 3 * case.dim + 4 * rows
    halves = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[case.direction]
    return case.batch * case.pixels**2 * halves


EXECUTED = {"cpu": _triangle_affinity_flops}  # backends that use the symmetry; dense ones have AffinityCase.flops


def _gemm_flops(case: AffinityCase) -> int:
    return 2 * case.batch * case.pixels**2 * case.dim


def _t_gemm(case: AffinityCase, inputs: Inputs) -> Runner:
    """The one product that eager cannot avoid, into memory that exists already."""
    feat = inputs.tensors[1]
    out = feat.new_empty(case.batch, case.pixels, case.pixels)
    out.zero_()  # its pages exist before anything is timed

    def run() -> tuple[Tensor, ...]:
        torch.matmul(feat.mT, feat, out=out)
        return ()

    return run


def _sdpa_affinity(case: AffinityCase, feat: Tensor) -> Tensor:
    q = feat.mT.unsqueeze(1)  # [B, 1, N, D]
    return F.scaled_dot_product_attention(q, q, q)


def _sdpa_affinity_make(case: AffinityCase, inputs: Inputs) -> Runner:
    feat = inputs.tensors[1].mT.contiguous().mT
    upstream = torch.randn_like(feat.mT.unsqueeze(1))
    return _in_direction(_sdpa_affinity)(case, Inputs((feat,), upstream))


def _attention_flops(case: AffinityCase) -> int:
    products = {"forward": 2, "backward": 5, "forward_backward": 7}[case.direction]
    return products * 2 * case.batch * case.pixels**2 * case.dim


def _affinity_variants(case: AffinityCase, ours: list[str]) -> list[Variant]:
    def ercn(name: str) -> Callable[..., Tensor]:
        return lambda case, cam, feat: affinity_propagate(cam, feat, normalize=False, backend=name)

    def compiled(case: AffinityCase, cam: Tensor, feat: Tensor) -> Tensor:
        return _compiled(eager.affinity)(cam, feat)

    big = {"bytes": AffinityCase.eager_bytes, "held": AffinityCase.graph_bytes}
    plain = _in_direction(lambda case, *x: eager.affinity(*x))
    blockwise = _in_direction(lambda case, *x: eager.blockwise_affinity(*x))
    return [
        Variant("t_gemm", "yardstick", _t_gemm, _gemm_flops, held=AffinityCase.gemm_bytes),
        Variant("eager", "baseline", plain, _eager_affinity_flops, **big),
        Variant("compile", "baseline", _in_direction(compiled), _eager_affinity_flops, **big),
        Variant("blockwise", "baseline", blockwise, _blockwise_affinity_flops),
        Variant("sdpa", "yardstick", _sdpa_affinity_make, _attention_flops),
        *(
            Variant(
                f"ercn-{name}",
                "ercn",
                _in_direction(ercn(name)),
                EXECUTED.get(name, AffinityCase.flops),
                backend=name,
            )
            for name in ours
        ),
    ]


def _each_bag(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pool of dense bags on every layout; ragged bags one after the other, as bags of batch size 1 are trained."""

    def pool(case: PoolCase, h: Tensor, *rest: Tensor) -> Tensor:
        if case.layout != "ragged":
            return function(h, *rest)
        weights = rest[:-1]
        return torch.cat([function(bag.unsqueeze(0), *weights) for bag in h.split(case.lengths())])

    return pool


def _t_mlp(case: PoolCase, inputs: Inputs) -> Runner:
    """The one product that eager cannot avoid, into memory that exists already."""
    h, v, u = inputs.tensors[0], inputs.tensors[1], inputs.tensors[3]
    h = h if case.layout == "ragged" else h[0]
    weight = torch.cat([v, u]).mT  # [D, 2L]
    out = h.new_empty(h.shape[0], weight.shape[1])
    out.zero_()

    def run() -> tuple[Tensor, ...]:
        torch.mm(h, weight, out=out)
        return ()

    return run


def _sdpa_pool(case: PoolCase, h: Tensor) -> Tensor:
    """One query attends to all instances, D split into heads of 64."""
    keys = h.reshape(1, -1, case.dim // 64, 64).transpose(1, 2)  # [1, D/64, N, 64]
    return F.scaled_dot_product_attention(keys[:, :, :1], keys, keys)


def _sdpa_pool_make(case: PoolCase, inputs: Inputs) -> Runner:
    h = inputs.tensors[0]
    upstream = h.new_ones(1, case.dim // 64, 1, 64)
    return _in_direction(_sdpa_pool)(case, Inputs((h,), upstream))


def _pool_attention_flops(case: PoolCase) -> int:
    products = {"forward": 2, "backward": 5, "forward_backward": 7}[case.direction]
    return products * 2 * case.total() * case.dim


def _eager_pool_flops(case: PoolCase) -> int:
    again = case.projection_flops() if case.direction != "forward" else 0
    return case.flops() - again


def _pool_variants(case: PoolCase, ours: list[str]) -> list[Variant]:
    def ercn(name: str, dropout_p: float = 0.0) -> Callable[..., Tensor]:
        def run(case: PoolCase, h: Tensor, *rest: Tensor) -> Tensor:
            weights, bounds = (rest[:-1], rest[-1]) if case.layout == "ragged" else (rest, None)
            return gated_attention_pool(h, *weights, cu_seqlens=bounds, dropout_p=dropout_p, backend=name)[0]

        return run

    def one_bag(name: str) -> Callable[[Case, Inputs], Runner]:
        def make(case: PoolCase, inputs: Inputs) -> Runner:
            h, *weights, _ = inputs.tensors
            whole = replace(case, layout="dense", instances=len(h), bags=1)
            one = Inputs((h.unsqueeze(0), *weights), inputs.upstream[:1])
            return _in_direction(ercn(name))(whole, one)

        return make

    def compiled(*tensors: Tensor) -> Tensor:
        return _compiled(eager.pool)(*tensors)

    big = {"bytes": PoolCase.eager_bytes, "held": PoolCase.graph_bytes}
    rows = [
        Variant("t_mlp", "yardstick", _t_mlp, PoolCase.projection_flops, held=PoolCase.gemm_bytes),
        Variant("eager", "baseline", _in_direction(_each_bag(eager.pool)), _eager_pool_flops, **big),
        Variant("compile", "baseline", _in_direction(_each_bag(compiled)), _eager_pool_flops, **big),
        Variant("blockwise", "baseline", _in_direction(_each_bag(eager.blockwise_pool)), PoolCase.flops),
        Variant("sdpa", "yardstick", _sdpa_pool_make, _pool_attention_flops),
    ]
    for name in ours:
        rows.append(Variant(f"ercn-{name}", "ercn", _in_direction(ercn(name)), PoolCase.flops, backend=name))
        if case.layout == "ragged":
            rows.append(Variant(f"one_bag-{name}", "yardstick", one_bag(name), PoolCase.flops, backend=name))
        elif case.layout == "dense" and name != "reference":  # CLAM's dropout
            dropout = _in_direction(ercn(name, 0.25))
            rows.append(Variant(f"dropout-{name}", "yardstick", dropout, PoolCase.flops, backend=name))
    return rows


def _many_times(function: Callable[..., Tensor]) -> Callable[[Case, Inputs], Runner]:
    def make(case: OverheadCase, inputs: Inputs) -> Runner:
        run = _in_direction(lambda case, *x: function(*x))(case, inputs)

        def calls() -> tuple[Tensor, ...]:
            for _ in range(CALLS - 1):
                run()
            return run()

        return calls

    return make


def _overhead_variants(case: OverheadCase, ours: list[str]) -> list[Variant]:
    plain, fused = {
        "relu_affinity": (lambda value, feat: value @ F.relu(feat.mT @ feat), relu_affinity),
        "affinity_propagate": (eager.propagate, affinity_propagate),
        "gated_attention_pool": (eager.pool, lambda *x, backend: gated_attention_pool(*x, backend=backend)[0]),
    }[case.function]

    def ercn(name: str) -> Variant:
        make = _many_times(lambda *x: fused(*x, backend=name))
        return Variant(f"ercn-{name}", "ercn", make, OverheadCase.flops, backend=name)

    return [Variant("eager", "baseline", _many_times(plain), OverheadCase.flops), *map(ercn, ours)]


def _refinement_variants(case: RefinementCase, ours: list[str]) -> list[Variant]:
    def ercn(name: str) -> Callable[..., Tensor]:
        return lambda case, cam, image: pixel_adaptive_refinement(
            cam, image, dilations=case.dilations, steps=case.steps, backend=name
        )

    def plain(case: RefinementCase, cam: Tensor, image: Tensor) -> Tensor:
        return eager.pixel_adaptive_refinement(cam, image, case.dilations, case.steps)

    def compiled(case: RefinementCase, cam: Tensor, image: Tensor) -> Tensor:
        return _compiled(eager.pixel_adaptive_refinement)(cam, image, case.dilations, case.steps)

    def eager_flops(case: RefinementCase) -> int:
        """Its convolutions multiply by ones and zeros: 9 products for each neighbour."""
        shifts = 8 * (case.steps * case.maps + 3) + 9 * 3
        runs = 2 if case.direction == "forward_backward" else 1
        again = (runs - 1) * 8 * case.steps * case.maps
        return 2 * 9 * len(case.dilations) * case.batch * case.size * (shifts + again)

    return [
        Variant("eager", "baseline", _in_direction(plain), eager_flops, RefinementCase.eager_bytes),
        Variant("compile", "baseline", _in_direction(compiled), eager_flops, RefinementCase.eager_bytes),
        *(
            Variant(f"ercn-{name}", "ercn", _in_direction(ercn(name)), RefinementCase.flops, backend=name)
            for name in ours
        ),
    ]


def _walk_variants(case: WalkCase, ours: list[str]) -> list[Variant]:
    def affinity(cam: Tensor, edge: Tensor) -> Tensor:
        return edge_affinity(edge.to(cam.dtype) / 255, WalkCase.radius)

    def ercn(name: str) -> Callable[..., Tensor]:
        return lambda case, cam, edge: random_walk(
            cam, affinity(cam, edge), radius=case.radius, beta=case.beta, steps=2**case.doublings, backend=name
        )

    def plain(case: WalkCase, cam: Tensor, edge: Tensor) -> Tensor:
        return eager.random_walk(cam, affinity(cam, edge), case.radius, case.beta, case.doublings)

    def eager_flops(case: WalkCase) -> int:
        runs = 2 if case.direction == "forward_backward" else 1
        return 2 * case.size**2 * (case.doublings * case.size + runs * case.maps)

    return [
        Variant("eager", "baseline", _in_direction(plain), eager_flops, WalkCase.eager_bytes),
        *(Variant(f"ercn-{name}", "ercn", _in_direction(ercn(name)), WalkCase.flops, backend=name) for name in ours),
    ]


def _model_variants(case: ModelCase, ours: list[str]) -> list[Variant]:
    def make(backend: str) -> Callable[[Case, Inputs], Runner]:
        return lambda case, inputs: network.runner(case, inputs, backend)

    def eager_bytes(case: ModelCase) -> float:
        return network.live_bytes(case) + case.affinity_bytes()

    def ours_row(name: str, backend: str) -> Variant:
        return Variant(f"ercn-{name}", "ercn", make(backend), network.flops, network.live_bytes, backend=backend)

    # Both ops must run on one backend; otherwise the automatic choice is measured.
    return [
        Variant("eager", "baseline", make(network.EAGER), network.flops, eager_bytes),
        ours_row("auto", ""),
        *(ours_row(name, name) for name in ours),
    ]
