"""The registry of cases: op × direction × shape × dtype, with random inputs, FLOPs and minimum bytes of each.

FLOPs are dense-equivalent: what the op costs without using its symmetry, a multiply-add counting two. Minimum bytes are
each input read once and each output written once. Directions: "forward" (no graph), "backward" (of a graph built
beforehand, gradients of every input) and "forward_backward".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward", "forward_backward")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("affinity", "mil", "refinement", "walk", "model", "overhead")
SEED = 0


@dataclass(frozen=True)
class Inputs:
    """Arguments of a case's function. ``leaves`` are those that need gradients, ``upstream`` is d loss / d output 0."""

    tensors: tuple[Tensor, ...]
    upstream: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self.tensors if x.is_floating_point())


@dataclass(frozen=True)
class AffinityCase:
    """``affinity_propagate`` of ``maps`` CAMs by normalised features; C = maps + 1 counts the row of ones.

    cam [B, maps, N] uniform in [0, 1], feat [B, D, N] normal, divided by its norm beforehand for every variant.
    """

    batch: int
    maps: int
    dim: int
    height: int
    direction: str = "forward"
    dtype: str = "float32"

    op = "affinity"
    baseline = "t_gemm"

    @property
    def pixels(self) -> int:
        return self.height**2

    @property
    def size(self) -> int:
        """N, the x axis of the plots."""
        return self.pixels

    @property
    def shape(self) -> str:
        return f"b{self.batch}-c{self.maps + 1}-d{self.dim}-{self.height}x{self.height}"

    @property
    def series(self) -> str:
        """The parameters that are constant along the x axis."""
        return f"B {self.batch}, C {self.maps + 1}, D {self.dim}"

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> AffinityCase:
        return replace(self, batch=1, height=4)

    def inputs(self, device: str, kink_safe: bool = False) -> Inputs:
        """kink_safe: features are small integers times a power of two, so FᵀF is exact in every dtype and no rounding
        moves a pair of pixels across the ReLU's kink; gradients can then be compared."""
        generator = torch.Generator().manual_seed(SEED)
        dtype = DTYPES[self.dtype]
        cam = torch.rand(self.batch, self.maps, self.pixels, generator=generator)
        if kink_safe:
            feat = torch.randint(-3, 4, (self.batch, self.dim, self.pixels), generator=generator) / 32.0
        else:
            feat = torch.randn(self.batch, self.dim, self.pixels, generator=generator)
            feat = feat / (feat.norm(dim=1, keepdim=True) + 1e-5)
        upstream = torch.randn(cam.shape, generator=generator)
        return Inputs(tuple(x.to(device, dtype) for x in (cam, feat)), upstream.to(device, dtype))

    def flops(self) -> int:
        """Forward D + C; backward T again D, [V;G] products of depth C each way, F·W D, and G·A of depth maps."""
        forward, backward = self.dim + self.maps + 1, 2 * self.dim + 3 * self.maps + 2
        depth = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[self.direction]
        return 2 * self.batch * self.pixels**2 * depth

    def min_bytes(self) -> int:
        maps, feat = self.maps, self.dim
        rows = {
            "forward": 2 * maps + feat,
            "backward": 3 * maps + 2 * feat,
            "forward_backward": 4 * maps + 2 * feat,
        }[self.direction]
        return rows * self.batch * self.pixels * DTYPES[self.dtype].itemsize

    def eager_bytes(self) -> float:
        """Peak extra memory of the eager version by arithmetic: 2.07 N² buffers forward, 6.1 with the backward.

        A backward that keeps its graph needs 5.1 beside the graph's two.
        """
        buffers = {"forward": 2.07, "backward": 5.1, "forward_backward": 6.1}[self.direction]
        return buffers * self.gemm_bytes()

    def graph_bytes(self) -> float:
        """Memory that eager keeps between forward and backward."""
        return 2 * self.gemm_bytes() if self.direction == "backward" else 0.0

    def gemm_bytes(self) -> float:
        return self.batch * self.pixels**2 * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PoolCase:
    """``gated_attention_pool`` with biases over ``instances`` of D channels in all, L hidden, K heads.

    layout "dense": one bag [1, N, D]; "map": the view [1, N, D] of a channels-first feature map; "ragged": ``bags``
    bags of 49 to 4096 instances, [T, D], about ``instances`` in all.
    """

    instances: int
    dim: int
    hidden: int
    heads: int = 1
    layout: str = "dense"
    bags: int = 1
    direction: str = "forward"
    dtype: str = "float32"

    op = "mil"
    baseline = "t_mlp"

    @property
    def size(self) -> int:
        return self.instances

    @property
    def shape(self) -> str:
        bags = f"-b{self.bags}" if self.layout == "ragged" else ""
        return f"{self.layout}{bags}-n{self.instances}-d{self.dim}-l{self.hidden}-k{self.heads}"

    @property
    def series(self) -> str:
        return f"{self.layout}, D {self.dim}, L {self.hidden}, K {self.heads}"

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> PoolCase:
        return replace(self, instances=64 if self.layout == "dense" else 49 * self.bags)

    def lengths(self) -> list[int]:
        """Lengths of the ragged bags: uniform draws scaled to sum to ``instances``, then clamped to [49, 4096]."""
        generator = torch.Generator().manual_seed(SEED)
        draws = torch.rand(self.bags, generator=generator)
        extra = self.instances - 49 * self.bags
        lengths = (49 + draws / draws.sum() * extra).long().clamp(49, 4096)
        return lengths.tolist()

    def inputs(self, device: str, kink_safe: bool = False) -> Inputs:
        """h, V, b_V, U, b_U, w, b_w and, for ragged bags, cu_seqlens. The op has no kink: kink_safe changes nothing."""
        generator = torch.Generator().manual_seed(SEED)
        dtype, dim, hidden, heads = DTYPES[self.dtype], self.dim, self.hidden, self.heads

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

        weights = [randn(hidden, dim, scale=dim**-0.5), randn(hidden), randn(hidden, dim, scale=dim**-0.5)]
        weights += [randn(hidden), randn(heads, hidden, scale=hidden**-0.5), randn(heads)]
        if self.layout == "ragged":
            bounds = torch.tensor([0, *self.lengths()]).cumsum(0).int().to(device)
            h = randn(sum(self.lengths()), dim)
            return Inputs((h, *weights, bounds), randn(self.bags, heads, dim))
        h = randn(1, dim, self.instances).mT if self.layout == "map" else randn(1, self.instances, dim)
        return Inputs((h, *weights), randn(1, heads, dim))

    def total(self) -> int:
        return sum(self.lengths()) if self.layout == "ragged" else self.instances

    def projection_flops(self) -> int:
        """One pass of [V|U] over all instances."""
        return 4 * self.total() * self.dim * self.hidden

    def flops(self) -> int:
        """Forward one product [V|U]; backward that one again, one for the weights, one for h."""
        narrow = 2 * self.total() * self.heads * (self.hidden + self.dim)
        products, narrows = {"forward": (1, 1), "backward": (3, 2), "forward_backward": (4, 3)}[self.direction]
        return products * self.projection_flops() + narrows * narrow

    def min_bytes(self) -> int:
        h, scores = self.total() * self.dim, self.total() * self.heads
        pooled = self.bags * self.heads * self.dim
        weights = 2 * self.hidden * (self.dim + 1) + self.heads * (self.hidden + 1)
        elements = {
            "forward": h + weights + pooled + scores,
            "backward": 2 * h + 2 * weights + pooled + scores,
            "forward_backward": 2 * h + 2 * weights + 2 * pooled + scores,
        }[self.direction]
        return elements * DTYPES[self.dtype].itemsize

    def eager_bytes(self) -> float:
        """Upper estimate: five [N, L] activations forward, ten with the backward, and the gradient of h."""
        rows = 5 * self.hidden if self.direction == "forward" else 10 * self.hidden + 2 * self.dim
        return rows * self.total() * DTYPES[self.dtype].itemsize

    def graph_bytes(self) -> float:
        """Memory that eager keeps between forward and backward."""
        return 5 * self.hidden * self.total() * DTYPES[self.dtype].itemsize if self.direction == "backward" else 0.0

    def gemm_bytes(self) -> float:
        return 2 * self.hidden * self.total() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RefinementCase:
    """``pixel_adaptive_refinement`` (PAMR) of ``maps`` maps by a picture of bytes, with the published six dilations and
    10 steps. The map alone has a gradient.
    """

    batch: int
    maps: int
    height: int
    direction: str = "forward"
    dtype: str = "float32"

    op = "refinement"
    baseline = "eager"
    dilations = (1, 2, 4, 8, 12, 24)
    steps = 10

    @property
    def size(self) -> int:
        return self.height**2

    @property
    def shape(self) -> str:
        return f"b{self.batch}-c{self.maps}-{self.height}x{self.height}"

    @property
    def series(self) -> str:
        return f"B {self.batch}, C {self.maps}"

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> RefinementCase:
        return replace(self, batch=1, height=8)

    def inputs(self, device: str, kink_safe: bool = False) -> Inputs:
        """The op has no kink: kink_safe changes nothing."""
        generator = torch.Generator().manual_seed(SEED)
        shape = self.batch, self.maps, self.height, self.height
        cam = torch.rand(shape, generator=generator)
        image = torch.randint(0, 256, (self.batch, 3, *shape[2:]), generator=generator, dtype=torch.uint8)
        upstream = torch.randn(shape, generator=generator)
        dtype = DTYPES[self.dtype]
        return Inputs((cam.to(device, dtype), image.to(device)), upstream.to(device, dtype))

    def flops(self) -> int:
        """All steps; the backward runs as many adjoint steps."""
        runs = 2 if self.direction == "forward_backward" else 1
        return runs * 2 * self.steps * 8 * len(self.dilations) * self.batch * self.maps * self.size

    def min_bytes(self) -> int:
        maps = 4 if self.direction == "forward_backward" else 2
        return self.batch * self.size * (3 + maps * self.maps * DTYPES[self.dtype].itemsize)

    def eager_bytes(self) -> float:
        """Of one step: the neighbours' copies of the maps, per dilation and concatenated; or copies and product."""
        return 2.1 * self.batch * self.maps * 8 * len(self.dilations) * self.size * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WalkCase:
    """IRN's walk of ``maps`` maps: 256 steps over the affinities of an edge map of bytes, radius 5, β 10.

    The maps alone have a gradient.
    """

    maps: int
    height: int
    direction: str = "forward"
    dtype: str = "float32"

    op = "walk"
    baseline = "eager"
    radius, beta, doublings = 5, 10, 8
    entries = 69  # nonzeros in each row of T

    @property
    def size(self) -> int:
        return self.height**2

    @property
    def shape(self) -> str:
        return f"c{self.maps}-{self.height}x{self.height}"

    @property
    def series(self) -> str:
        return f"C {self.maps}"

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> WalkCase:
        return replace(self, height=8)

    def inputs(self, device: str, kink_safe: bool = False) -> Inputs:
        """The op has no kink: kink_safe changes nothing."""
        generator = torch.Generator().manual_seed(SEED)
        shape = 1, self.maps, self.height, self.height
        cam = torch.rand(shape, generator=generator)
        edge = torch.randint(0, 64, (1, 1, *shape[2:]), generator=generator, dtype=torch.uint8)
        upstream = torch.randn(shape, generator=generator)
        dtype = DTYPES[self.dtype]
        return Inputs((cam.to(device, dtype), edge.to(device)), upstream.to(device, dtype))

    def flops(self) -> int:
        """All steps; the backward runs as many adjoint steps."""
        runs = 2 if self.direction == "forward_backward" else 1
        return runs * 2 * 2**self.doublings * self.entries * self.maps * self.size

    def min_bytes(self) -> int:
        maps = 4 if self.direction == "forward_backward" else 2
        return self.size * (1 + maps * self.maps * DTYPES[self.dtype].itemsize)

    def eager_bytes(self) -> float:
        """The dense matrix, its power, T and its square."""
        return 4.1 * self.size**2 * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ModelCase:
    """The whole network at ``image_size`` pixels, ResNet-50, with affinity, MIL and the hybrid loss (``network``).

    "forward" is inference in eval mode; "forward_backward" one training step (two views, the hybrid equivariant loss,
    gradients of all parameters, no optimizer), with ``checkpointing`` of the backbone's blocks or without. bfloat16 and
    float16 are autocast.
    """

    image_size: int
    batch: int = 1
    stride: int = 16
    checkpointing: bool = False
    backbone: str = "resnet50"
    direction: str = "forward"
    dtype: str = "float32"

    op = "model"
    baseline = "eager"

    @property
    def size(self) -> int:
        return self.image_size**2

    @property
    def shape(self) -> str:
        stride = "" if self.stride == 16 else f"-os{self.stride}"
        return f"{self.backbone}-b{self.batch}-{self.image_size}px{stride}{'-checkpointing' * self.checkpointing}"

    @property
    def series(self) -> str:
        stride = "" if self.stride == 16 else f", output stride {self.stride}"
        return f"{self.backbone}, B {self.batch}{stride}{', checkpointing' * self.checkpointing}"

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> ModelCase:
        return replace(self, image_size=64)

    def affinity_bytes(self) -> float:
        """Eager's N² buffers alone; the rest of the network adds the same to every variant."""
        pixels = (self.image_size // self.stride + 1) ** 2
        views, buffers = (1, 2.07) if self.direction == "forward" else (2, 6.1)
        return views * buffers * self.batch * pixels**2 * 4


CALLS = 100  # few enough to run without being preempted on a busy machine


@dataclass(frozen=True)
class OverheadCase:
    """``CALLS`` small calls of a public function one after the other: a row's 0.1 ms is 1 µs of a call.

    One image of 4 × 4 pixels with 5 maps and 64 features, or one bag of 16 instances of 64 channels with 16 hidden
    units: the host cost of a call, whatever it computes.
    """

    function: str
    direction: str = "forward"
    dtype: str = "float32"

    op = "overhead"
    baseline = "eager"

    @property
    def inner(self) -> AffinityCase | PoolCase:
        if self.function == "gated_attention_pool":
            return PoolCase(16, 64, 16, direction=self.direction, dtype=self.dtype)
        return AffinityCase(1, 5, 64, 4, self.direction, self.dtype)

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def shape(self) -> str:
        return f"{self.function}-n{self.size}-x{CALLS}"

    @property
    def series(self) -> str:
        return self.function

    @property
    def id(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.shape}"

    def tiny(self) -> OverheadCase:
        return self

    def inputs(self, device: str, kink_safe: bool = False) -> Inputs:
        return self.inner.inputs(device, kink_safe)

    def flops(self) -> int:
        rows = 0  # of ones: relu_affinity has none
        if self.function == "relu_affinity":
            rows = {"forward": 1, "backward": 2, "forward_backward": 3}[self.direction]
        return CALLS * (self.inner.flops() - 2 * self.size**2 * rows)

    def min_bytes(self) -> int:
        return CALLS * self.inner.min_bytes()


Case = AffinityCase | PoolCase | RefinementCase | WalkCase | ModelCase | OverheadCase


def _affinity(gpu: bool) -> list[AffinityCase]:
    shapes = [
        AffinityCase(batch, maps, dim, height)
        for height in (28, 56, 96, 128, 256)
        for dim in (64, 128, 192, 256)
        for maps in (5, 21)
        for batch in (1, 8)
    ]
    return _directions_and_dtypes(shapes, gpu)


def _mil(gpu: bool) -> list[PoolCase]:
    dense = [
        PoolCase(instances, dim, hidden, heads)
        for instances in (49, 1024, 4096, 8192, 32768, 65536)
        for dim in (512, 1024, 2048)
        for hidden in (128, 256, 512)
        for heads in (1, 4)
    ]
    maps = [PoolCase(height**2, dim, hidden, layout="map") for height in (7, 32, 64, 128) for dim in (512, 2048)
            for hidden in (128, 256)]  # fmt: skip
    ragged = [PoolCase(bags * 2048, dim, 256, layout="ragged", bags=bags) for bags in (8, 64) for dim in (512, 1024)]
    return _directions_and_dtypes(dense + maps + ragged, gpu)


def _refinement(gpu: bool) -> list[RefinementCase]:
    shapes = [RefinementCase(1, maps, height) for height in (56, 128, 256, 512) for maps in (1, 5, 21)]
    shapes += [RefinementCase(8, 21, 56), RefinementCase(8, 5, 256)]
    return _without_backward_alone(shapes)


def _walk(gpu: bool) -> list[WalkCase]:
    return _without_backward_alone([WalkCase(maps, height) for height in (28, 56, 64, 128) for maps in (1, 4, 21)])


def _without_backward_alone(shapes: list) -> list:
    return [replace(shape, direction=direction) for shape in shapes for direction in ("forward", "forward_backward")]


def _model(gpu: bool) -> list[ModelCase]:
    shapes = [ModelCase(size, batch) for size in (512, 1024, 2048) for batch in (1, 8)]
    for size in (1024, 2048):
        shapes += [ModelCase(size, stride=8), ModelCase(size, stride=8, checkpointing=True)]
    cases = [case for case in _directions_and_dtypes(shapes, gpu) if case.direction != "backward"]
    return [case for case in cases if case.direction == "forward_backward" or not case.checkpointing]


def _overhead(gpu: bool) -> list[OverheadCase]:
    return [
        OverheadCase(function, direction)
        for function in ("relu_affinity", "affinity_propagate", "gated_attention_pool")
        for direction in ("forward", "forward_backward")
    ]


def _directions_and_dtypes(shapes: list, gpu: bool) -> list:
    dtypes = DTYPES if gpu else ("float32", "bfloat16")
    return [
        replace(shape, direction=direction, dtype=dtype)
        for shape in shapes
        for dtype in dtypes
        for direction in DIRECTIONS
    ]


def registry(op: str, device: str) -> list[Case]:
    """Every case of an op. TF32 and float16 are measured on GPUs only."""
    gpu = device == "cuda"
    makers = {
        "affinity": _affinity,
        "mil": _mil,
        "refinement": _refinement,
        "walk": _walk,
        "model": _model,
        "overhead": _overhead,
    }
    return makers[op](gpu)


# The standard suites are those of docs/performance.md, about ten minutes on two cores; "full" has every shape.
_STANDARD = {
    "cpu": (
        r"affinity/forward/float32/b1-c6-d192-28x28",
        r"affinity/forward/float32/b1-c(6|22)-d(192|256)-56x56",
        r"affinity/forward/float32/b1-c22-d64-56x56",
        r"affinity/forward/float32/b1-(c6-d192|c6-d256|c22-d192)-96x96",
        r"affinity/forward/bfloat16/b1-c6-d192-(56x56|96x96)",
        r"affinity/backward/float32/b1-(c6-d192|c6-d256|c22-d192)-56x56",
        r"affinity/forward_backward/float32/b1-c(6|22)-d192-56x56",
        r"affinity/forward_backward/float32/b1-c6-d192-96x96",
        r"mil/(forward|forward_backward)/float32/dense-n49-d512-l256-k1",
        r"mil/forward/float32/dense-n(1024|8192|32768)-d(512|1024)-l256-k1",
        r"mil/forward_backward/float32/dense-(n1024-d512|n1024-d1024|n8192-d512|n8192-d1024|n32768-d512)-l256-k1",
        r"mil/forward/float32/dense-n8192-d1024-l256-k4",
        r"mil/forward/float32/map-n4096-d512-l128-k1",
        r"mil/forward/float32/ragged-b64-n131072-d512-l256-k1",
        r"mil/forward_backward/float32/ragged-b8-n16384-d512-l256-k1",
        r"refinement/forward/float32/b1-c(1|5|21)-256x256",
        r"refinement/forward/float32/b8-c21-56x56",
        r"refinement/forward_backward/float32/b1-c(5|21)-256x256",
        r"walk/forward/float32/c(4|21)-(56x56|64x64)",
        r"walk/forward_backward/float32/c21-56x56",
        r"model/.*/float32/resnet50-b1-512px",
        r"overhead/.*",
    ),
    "cuda": (
        r"affinity/.*/bfloat16/b1-c22-d(64|192|256)-(56x56|128x128|256x256)",
        r"affinity/.*/bfloat16/b8-c22-d192-56x56",
        r"affinity/.*/(float32|tf32)/b1-c22-d192-(56x56|128x128)",
        r"affinity/.*/float32/b1-c22-d192-256x256",
        r"affinity/forward/bfloat16/b1-c6-d192-(28x28|56x56|96x96|128x128|256x256)",
        r"mil/.*/bfloat16/dense-n(49|1024|8192|65536)-d1024-l256-k1",
        r"mil/forward/bfloat16/dense-n65536-d512-l128-k1",
        r"mil/.*/tf32/dense-n8192-d1024-l256-k1",
        r"mil/.*/bfloat16/dense-n8192-d2048-l512-k4",
        r"mil/forward/bfloat16/map-n4096-d2048-l128-k1",
        r"mil/.*/bfloat16/ragged-b64-n131072-d1024-l256-k1",
        r"refinement/.*/float32/b1-c(5|21)-(256x256|512x512)",
        r"refinement/.*/float32/b8-(c21-56x56|c5-256x256)",
        r"walk/.*/float32/c21-(56x56|64x64|128x128)",
        r"model/.*/bfloat16/resnet50-b1-(1024|2048)px(-os8|-os8-checkpointing)?",
        r"model/.*/bfloat16/resnet50-b8-512px",
        r"overhead/.*",
    ),
}
_QUICK = (
    r"affinity/.*/float32/b1-c6-d192-28x28",
    r"mil/(forward|forward_backward)/float32/dense-n1024-d512-l128-k1",
    r"refinement/.*/float32/b1-c5-56x56",
    r"walk/.*/float32/c4-28x28",
)


def suite(op: str, device: str, name: str) -> list[Case]:
    """The cases of "quick", "standard" or "full" for one op or "all"."""
    cases = [case for each in (OPS if op == "all" else (op,)) for case in registry(each, device)]
    if name == "full":
        return cases
    patterns = _QUICK if name == "quick" else _STANDARD[device]
    return [case for case in cases if any(re.fullmatch(pattern, case.id) for pattern in patterns)]
