"""``ercn doctor``: what is installed, which backends run here, and why the others do not."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import ercn
from ercn._environment import version
from ercn.ops import _backends, _budget, _extension, backends, relu_affinity

REBUILD = "ERCN_BUILD={} pip install --no-build-isolation --no-deps --force-reinstall . (in the source folder)"
# Variables besides ERCN_* that choose devices, threads or kernels.
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET")


def doctor(selftest: bool = False) -> int:
    """Print the state of this installation. Returns 0 if the operators can run, else 1.

    selftest: also compare every backend that runs here with the reference in float64, forward and backward, on small
    inputs; an error above the budget of the operators' tests prints FAILED and returns 1.
    """
    _table("Versions", _versions())
    _table("Hardware", _hardware())
    _table("Compiled libraries", [*_compiled_cpu(), *_compiled_cuda()])
    _table("Backends, in the order tried", _backend_rows())
    _table("Training extra", _training_extra())
    _table("Environment variables", _environment())
    problem = _problem()
    ok = problem is None
    _table("Operators", [("status", "they run" if ok else problem)])
    if ok and selftest:
        ok = _selftest()
    return 0 if ok else 1


def _table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


def _versions() -> list[tuple[str, str]]:
    rows = [("ercn", ercn.__version__), ("python", platform.python_version())]
    rows += [(package, version(package) or "not installed") for package in ("torch", "numpy", "triton")]
    return rows + [("CUDA runtime", torch.version.cuda or torch.version.hip or "none: this torch is for CPUs only")]


def _hardware() -> list[tuple[str, str]]:
    rows = [("system", platform.platform()), ("CPU", f"{cpu_name()}, {torch.get_num_threads()} threads in use")]
    if _extension.load() is None:
        info = _extension.cpu_info()
        rows.append(("CPU features", " ".join(name for name, present in info["features"].items() if present)))
        rows.append(("CPU kernels", os.environ.get("ERCN_CPU_ISA") or info["isas"][-1]))
    else:
        rows.append(("CPU features", f"{torch.backends.cpu.get_cpu_capability()} (as torch sees it)"))
    if not torch.cuda.is_available():
        return rows + [("GPU", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def cpu_name() -> str:
    """The processor's name as the system gives it, with family and model: virtual machines hide the rest."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {found[at]}" for key, at in (("family", "cpu family"), ("model", "model")) if at in found]
    return f"{name} ({' '.join(numbers)})" if numbers else name


def _compiled_cpu() -> list[tuple[str, str]]:
    reason = _extension.load()
    if reason is not None:
        return [("libercn", f"absent; {reason}"), ("to build it", REBUILD.format("cpu"))]
    info = _extension.cpu_info()["build"]
    return [
        ("libercn", f"present, for torch {info['torch_target_version']} and newer"),
        ("file", str(_extension.path())),
        ("built with", f"{info['compiler']}, C++{str(info['cpp_standard'])[2:4]}"),
        ("flags", f"{info['flags']} ({info['build_type']})"),
    ]


def _compiled_cuda() -> list[tuple[str, str]]:
    reason = _extension.load("libercn_cuda")
    if reason is not None:
        return [("libercn_cuda", f"absent; {reason}"), ("to build it", REBUILD.format("cuda"))]
    info, kernels = _extension.cuda_info(), _extension.cuda_kernels()
    text = f"present, {len(kernels)} kernels for compute capabilities {info['archs'].replace(',', ', ')}"
    return [("libercn_cuda", text), ("built with", f"CUDA {info['cuda']}")]


def _backend_rows() -> list[tuple[str, str]]:
    return [(f"{row.name} ({row.device})", row.reason or _usable(row.automatic)) for row in backends()]


def _usable(automatic: bool) -> str:
    return "usable" if automatic else "usable when named"


def _training_extra() -> list[tuple[str, str]]:
    try:
        requirements = metadata.requires("ercn") or []
    except metadata.PackageNotFoundError:
        return [("status", "unknown: ercn runs from a source tree that is not installed")]
    packages = [re.match(r"[\w.-]+", line)[0] for line in requirements if re.search(r"extra == ['\"]train['\"]", line)]
    missing = [package for package in packages if version(package) is None]
    if missing:
        return [("status", f"missing: {', '.join(missing)}"), ("to install it", "pip install 'ercn[train]'")]
    return [("status", f"complete ({len(packages)} packages)")]


def _environment() -> list[tuple[str, str]]:
    names = sorted(name for name in os.environ if name.startswith("ERCN_") or name in ENVIRONMENT)
    return [(name, os.environ[name]) for name in names] or [("none", "defaults are in force")]


def _problem() -> str | None:
    """Runs an operator; the reason where that fails."""
    try:
        relu_affinity(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    except (RuntimeError, ValueError) as error:
        return f"they do not run: {error}"
    return None


def _selftests() -> dict[str, list]:
    """Arguments of every op; differentiable tensors require a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    # Small integers: T = FᵀF is exact in every dtype, so no rounding moves a pair across the ReLU's kink.
    feat = torch.randint(-3, 4, (2, 24, 131), generator=generator).float().requires_grad_()
    shapes = [(2, 131, 24), (16, 24), (16,), (16, 24), (16,), (2, 16), (2,)]  # h, V, b_V, U, b_U, w, b_w
    pool = [draw(*shape) for shape in shapes]
    picture, near = draw(2, 3, 9, 11).detach(), torch.rand(2, 4, 9, 11, generator=generator)
    return {
        "relu_affinity": [draw(2, 3, 131), feat],
        "gated_attention_pool": [*pool, None, None, None, 0.0, "tanh"],
        "attention_scores": [*pool, None, None, torch.tensor([1]), 0.25, "gelu"],
        "pool_by_scores": [draw(2, 2, 131), draw(2, 131, 24), None, None],
        "pixel_adaptive_refinement": [draw(2, 4, 9, 11), picture, [1, 2], 3, "pamr"],
        "random_walk": [draw(2, 4, 9, 11), near, 2, 2.0, 3],
    }


def _arguments(op: str, dtype: torch.dtype, device: str) -> list:
    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        placed = x.detach().to(device, dtype if x.is_floating_point() else x.dtype)
        return placed.requires_grad_(x.requires_grad)

    return [placed(x) for x in _selftests()[op]]


def _outputs(op: str, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """Outputs and gradients of every input, for a fixed random upstream gradient."""
    args = _arguments(op, dtype, device)
    out = getattr(torch.ops.ercn, op)(*args, backend)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    gradients = torch.autograd.grad(out, [x for x in args if isinstance(x, Tensor) and x.requires_grad], upstream)
    return [x.detach().cpu().double() for x in (*out, *gradients)]


def _error(op: str, actual: list[Tensor], exact: list[Tensor]) -> float:
    channels = op == "relu_affinity"
    return max(_budget.error(a, e, channels) for a, e in zip(actual, exact, strict=True))


def _selftest() -> bool:
    rows, ok = [], True
    for op in _selftests():
        exact = _outputs(op, torch.float64, "cpu", "reference")
        plain = _error(op, _outputs(op, torch.float32, "cpu", "reference"), exact)
        limit = _budget.allowed(plain, torch.float32)
        for row, device in _usable_on(op):
            try:
                error = _error(op, _outputs(op, torch.float32, device, row), exact)
                passed, text = error <= limit, f"error {error:.1e}, allowed {limit:.1e}"
            except Exception as failure:  # noqa: BLE001 - any error of a backend is its result
                passed, text = False, f"{type(failure).__name__}: {failure}"
            ok = ok and passed
            rows.append((f"{op}, {row} on {device}", f"{'passed' if passed else 'FAILED'}: {text}"))
    _table("Self-test: float32 against the reference in float64, forward and backward", rows)
    return ok


def _usable_on(op: str) -> Iterable[tuple[str, str]]:
    present = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for backend in _backends.TABLE:
        for device in present:
            if backend.can_run(op, *_arguments(op, torch.float32, device)) is None:
                yield backend.name, device
