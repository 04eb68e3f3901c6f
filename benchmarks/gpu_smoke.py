"""Smoke cases of the GPU check: every kernel on exact inputs, each in a process of its own that is killed if it hangs.

The processes are forks of one that has imported everything and has not touched the GPU, so each costs a context and no
import. ``exact`` has the inputs and expected results; memory that a kernel allocates holds NaN.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ercn.benchmarks import exact
from ercn.benchmarks.cases import DTYPES
from ercn.benchmarks.results import sentence
from ercn.benchmarks.settings import precision, variable
from ercn.ops import _extension, reference
from ercn.ops._arguments import DIFFERENTIABLE

SILENT_S = {"cuda": 15.0, "cpu": 60.0}  # a process that reports nothing for so long hangs
HANGING = 3  # hanging groups of an op and direction, after which the others are not run
SIDE_BY_SIDE = min(6, os.cpu_count() or 1)
SIZES = {"cuda": (300, 128, 1027, 1), "cpu": (70,)}  # pixels or instances of a bag
HALVES = ("bfloat16", "float16")
LAYOUTS = ("rows", "channels_first", "ragged", "masked")


@dataclass(frozen=True)
class Group:
    """Sizes of one kernel, which run one after the other in one process.

    kernels: generic, sm90 or sm90_dense of the backend ``cuda``; triton, or triton_triangle.
    channels: C of the affinity. layout: of the pool's instances. hidden: L of the pool, heads: K. op "scores" is the
    pool's scores alone, with an activation and a dropout of one half, "by_scores" the pooling by given scores.
    weights: dtype of the pool's weights, if it is not h's.
    """

    op: str
    direction: str
    kernels: str
    dtype: str
    dim: int
    channels: int = 0
    layout: str = ""
    hidden: int = 0
    heads: int = 1
    activation: str = "tanh"
    weights: str = ""

    @property
    def name(self) -> str:
        shape = f"D {self.dim}, C {self.channels}" if self.op == "affinity" else f"{self.layout}, D {self.dim}"
        kind = f", {self.activation}" if self.op == "scores" else ""
        weights = f" beside {self.weights}" if self.weights else ""
        return f"{self.op} {self.direction}{kind}, {self.kernels}, {self.dtype}{weights}, {shape}"

    @property
    def backend(self) -> str:
        return "triton" if self.kernels.startswith("triton") else "cuda"


def groups(only: str = "") -> list[Group]:
    """The headline first, then the kernels that are most likely to hang: Hopper, generic CUDA, Triton."""
    found = [Group("affinity", "forward", "sm90", "bfloat16", 192, 22)]
    for layout in LAYOUTS:
        found += [Group("pool", way, "sm90", "bfloat16", 128, layout=layout, hidden=128, heads=2)
                  for way in ("forward", "backward")]  # fmt: skip
    found += [Group("scores", way, kernels, "bfloat16", 128, layout="rows", hidden=128, heads=2)
              for kernels in ("sm90", "generic") for way in ("forward", "backward")]  # fmt: skip
    for channels in (22, 7, 30):  # padded to 24, 8 and 32
        for dim in (192, 64, 128, 256):
            for dtype in HALVES:
                found += [Group("affinity", "forward", kernels, dtype, dim, channels)
                          for kernels in ("sm90", "sm90_dense")]  # fmt: skip
                found.append(Group("affinity", "backward", "sm90", dtype, dim, channels))
    for kernels in ("sm90", "generic", "triton"):
        for dtype in HALVES if kernels == "sm90" else DTYPES:
            for way in ("forward", "backward"):
                if kernels != "sm90":
                    found.append(Group("affinity", way, kernels, dtype, 192, 22))
                if kernels == "triton" and way == "forward":
                    found.append(Group("affinity", way, "triton_triangle", dtype, 192, 22))
                for layout in LAYOUTS if dtype == "bfloat16" else ("rows",):
                    found.append(Group("pool", way, kernels, dtype, 128, layout=layout, hidden=128, heads=2))
    for way in ("forward", "backward"):
        for layout in LAYOUTS:
            sizes = {"dim": 128, "hidden": 128, "heads": 2, "layout": layout}
            pool = functools.partial(Group, direction=way, kernels="triton", **sizes)
            found.append(pool("by_scores", dtype="bfloat16"))
            found.append(pool("scores", dtype="bfloat16", activation="gelu" if layout == "rows" else "tanh"))
        pool = functools.partial(pool, layout="rows")
        found += [pool("scores", dtype="float32", activation="relu"), pool("by_scores", dtype="float32")]
        found.append(pool("pool", dtype="bfloat16", weights="float32"))
        found.append(Group("by_scores", way, "generic", "bfloat16", 128, layout="masked", hidden=128, heads=2))
    return [group for group in dict.fromkeys(found) if re.search(only, group.name)]


@dataclass(frozen=True)
class Case:
    """A call of a launcher and its expected results."""

    call: Callable[[], Any]
    names: tuple[str, ...]
    expected: Mapping[str, Tensor | None]


def make(group: Group, size: int, device: str) -> Case:
    """Inputs and results are made on the CPU, so that the kernels' own are the first launches on the GPU."""
    launcher = import_module(f"ercn.ops.{group.backend}")
    suffix = "_backward" if group.direction == "backward" else ""
    dtype = DTYPES[group.dtype]

    def there(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if x is None else x.to(device) for x in tensors]

    if group.op == "affinity":
        value, feat, grad = exact.affinity(2, group.channels, group.dim, size, dtype)
        expected = exact.expected_affinity(value, feat, grad)
        names = ("grad_value", "grad_feat") if suffix else ("out",)
        arguments = [*there(grad, value, feat), True] if suffix else there(value, feat)
        op = "relu_affinity"
    else:
        bags: Any = [0, size, 1, size // 2] if group.layout == "ragged" else size
        mask = (torch.arange(size) % 3 > 0).expand(2, size) if group.layout == "masked" else None
        layout = group.layout if group.layout == "channels_first" else "rows"
        if layout == "channels_first":
            bags = size + -size % 8  # a channel's instances are multiples of 16 bytes
        weights = DTYPES[group.weights] if group.weights else None
        p = exact.pool(
            bags, group.dim, group.hidden, group.heads, dtype, bags=2, layout=layout, mask=mask, weights_dtype=weights
        )
        seed, dropped = (torch.tensor([1 << 40]), 0.5) if group.op == "scores" else (None, 0.0)
        arguments = there(*p.inputs, p.mask, p.cu_seqlens, seed) + [dropped, group.activation]
        names = tuple(f"grad_{name}" for name in DIFFERENTIABLE)
        if group.op == "pool":
            expected, grads, op = exact.expected_pool(p), (p.grad_pooled, p.grad_scores), "gated_attention_pool"
            outputs = ("pooled", "scores")
        elif group.op == "scores":
            instances = torch.arange(p.h[..., 0].numel())
            factors = reference.dropout_factors(seed, dropped, instances, group.hidden, torch.float32)
            expected, grads = exact.expected_scores(p, group.activation, factors), (None, p.grad_scores)
            op, outputs = "gated_attention_pool" if suffix else "attention_scores", ("scores",)
        else:
            scores, expected = exact.by_scores(p)
            arguments = there(scores, p.h, p.mask, p.cu_seqlens)
            op, outputs, names = "pool_by_scores", ("pooled",), ("grad_scores", "grad_value")
        if group.op == "by_scores" and suffix:
            arguments = [*there(p.grad_pooled), *arguments, [True, True]]
        elif suffix:
            arguments = [*there(*grads), *arguments, *there(expected["scores"]), [True] * len(p.inputs)]
        names = names if suffix else outputs

    def call() -> Any:
        return getattr(launcher, op + suffix)(*arguments, *_plan(group, size, arguments[0].device))

    return Case(call, names, {name: expected[name] for name in names})


def _plan(group: Group, size: int, device: torch.device) -> tuple:
    """The plan for Triton's affinity forward, dense or triangle; the other launchers choose for themselves."""
    if group.backend != "triton" or (group.op, group.direction) != ("affinity", "forward"):
        return ()
    from ercn.kernels import configs

    sizes = 2, group.channels, group.dim, size, DTYPES[group.dtype], configs.arch(device)
    return (configs.forward_plan(*sizes, triangle=group.kernels == "triton_triangle"),)


def run(group: Group, size: int, device: str) -> tuple[str, str]:
    """("passed" or "wrong" or "failed", why)."""
    try:
        case = make(group, size, device)
        if group.backend == "cuda" and device == "cpu" and os.environ.get("ERCN_CUDA_EMULATED") != "1":
            return "only made", "no GPU, and ERCN_CUDA_EMULATED is not 1"
        with settings(group), uninitialised_is_nan():
            found = case.call() if group.direction == "forward" else in_backward(case.call, device)
        found = dict(zip(case.names, found if isinstance(found, tuple) else (found,), strict=True))
        found = {name: None if case.expected[name] is None else x.cpu() for name, x in found.items()}
        reason = exact.differences(found, case.expected)
        return ("passed", "") if reason is None else ("wrong", reason)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result
        traceback.print_exc()
        return "failed", sentence(error)


@contextlib.contextmanager
def settings(group: Group) -> Iterator[None]:
    """This process runs the group's kernels and no others."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(variable("ERCN_CUDA_KERNELS", group.kernels if group.backend == "cuda" else ""))
        stack.enter_context(precision(group.dtype))
        yield


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that C++ and Triton's launchers allocate holds NaN, so that an unwritten output shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public name imports torch._inductor
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def in_backward(call: Callable[[], Any], device: str) -> Any:
    """The call's result on the thread where autograd runs backwards, which is new and has not used the GPU."""
    results = []

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            results.append(call())
            return grad

    Call.apply(torch.ones(1, device=device, requires_grad=True)).sum().backward()
    return results[0]


def emulate() -> None:
    """Under ERCN_CUDA_EMULATED=1 the backend ``cuda`` is the tests' emulator."""
    if os.environ.get("ERCN_CUDA_EMULATED") == "1":
        _of_tests("cuda", "_cuda_emulator").become_backend()


def _of_tests(folder: str, name: str) -> ModuleType:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / folder))
    return import_module(name)


def compile_ahead(arch: str) -> None:
    """Compile the kernels of the cases' first sizes for ``arch`` into Triton's cache, without a GPU."""
    with _of_tests("triton", "_triton_aot").recording(arch):
        for group in groups("triton"):
            with settings(group):
                make(group, SIZES["cuda"][0], "meta").call()


def run_here(only: str, device: str, pixels: int) -> int:
    """The groups of that name in this process, at small sizes or one of ``pixels``; 1 where one does not pass."""
    emulate()
    bad = 0
    for group in groups(only):
        for size in (pixels,) if pixels else SIZES["cpu"]:
            status, reason = run(group, size, device)
            print(f"{group.name}, N {size}: {status} {reason}", flush=True)
            bad |= status in ("wrong", "failed")
    return int(bad)


def _process(group: Group, sizes: tuple[int, ...], device: str, pipe: Connection) -> None:
    from ercn import kernels

    torch.set_num_threads(2)
    with kernels.counting_launches() as counts:
        for size in sizes:
            pipe.send(("begins", size))
            pipe.send(("ends", run(group, size, device)))
            names = [f"triton {name}" for name in counts]
            if _extension.load("libercn_cuda") is None:
                names += [f"cuda {kernel['name']}" for kernel in _extension.cuda_kernels() if kernel["launches"] > 0]
            pipe.send(("launched", names))


@dataclass
class Running:
    """A group's process: the sizes left, the size at work (None before the first), and the time of its last report."""

    group: Group
    process: multiprocessing.Process
    left: list[int]
    size: int | None
    heard: float


def smoke(
    found: list[Group], device: str, seconds: float, done: Callable[..., None], side_by_side: int = SIDE_BY_SIDE
) -> None:
    """Runs every group; ``done(kind, **values)`` gets a row for every size, and what a process launched."""
    emulate()
    _extension.load("libercn_cuda")
    import_module("ercn.kernels.affinity")
    import_module("ercn.kernels.attention_pool")
    context = multiprocessing.get_context("fork")
    deadline, waiting = time.monotonic() + seconds, list(found)
    running: dict[Connection, Running] = {}
    hung: Counter[tuple[str, ...]] = Counter()

    def kind(group: Group) -> tuple[str, ...]:
        return group.op, group.direction, group.kernels

    def finish(pipe: Connection, status: str, reason: str) -> None:
        """The process has ended or is killed; a row names the sizes that it left."""
        entry = running.pop(pipe)
        entry.process.kill()
        if entry.size is None and entry.left:
            entry.size = entry.left.pop(0)
        if entry.size is not None:
            row(entry.group, entry.size, status, reason, time.monotonic() - entry.heard)
        for size in entry.left:
            row(entry.group, size, "not run", f"after N {entry.size}, which was {status}")
        pipe.close()

    def row(group: Group, size: int, status: str, reason: str, took: float = 0.0) -> None:
        what = {name: getattr(group, name) for name in ("op", "direction", "kernels", "dtype", "dim", "layout")}
        done("smoke", name=group.name, size=size, status=status, reason=reason, seconds=round(took, 2), **what)

    while (running or waiting) and time.monotonic() < deadline:
        while waiting and len(running) < side_by_side:
            group = waiting.pop(0)
            if hung[kind(group)] >= HANGING:
                for size in SIZES[device]:
                    row(group, size, "not run", f"{HANGING} others of its kind hung")
                continue
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(group, SIZES[device], device, there), daemon=True)
            process.start()
            there.close()
            running[here] = Running(group, process, list(SIZES[device]), None, time.monotonic())
        for pipe in wait(list(running), timeout=0.2):
            entry = running[pipe]
            try:
                word, value = pipe.recv()
            except EOFError:
                entry.process.join(1)
                finish(pipe, "crashed", f"its process ended with exit code {entry.process.exitcode}")
                continue
            if word == "begins":
                entry.size = value
                entry.left.remove(value)
            elif word == "ends":
                row(entry.group, entry.size, *value, time.monotonic() - entry.heard)
                entry.size = None
            else:
                done("launched", names=value, by=entry.group.name)
            entry.heard = time.monotonic()
        for pipe, entry in list(running.items()):
            if time.monotonic() - entry.heard > SILENT_S[device]:
                hung[kind(entry.group)] += 1
                finish(pipe, "killed", f"no word for {SILENT_S[device]:.0f} s")
    for pipe in list(running):
        finish(pipe, "not run", "out of time")
    for group in waiting:
        for size in SIZES[device]:
            row(group, size, "not run", "out of time")
