"""How an op joins torch: one schema, kernels in C++ or in the table of backends, autograd, autocast, help for vmap."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _ExcludeDispatchKeyGuard,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import _profiler_enabled, forward_ad
from torch.autograd.function import _SingleLevelFunction

from ercn.ops import _backends, _extension, cpu

_extension.load()  # it defines the schemas, which Python defines where it is absent
_LIBRARY = torch.library.Library("ercn", "FRAGMENT")
DEFINED: list[torch._ops.OpOverload] = []
_META = DispatchKeySet(DispatchKey.Meta)
_DEVICES = ("CPU", "CUDA", "XPU", "MPS")  # that have autocast
_ABOVE = (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor)
_ABOVE += tuple(getattr(DispatchKey, f"Autocast{device}") for device in _DEVICES)
_ABOVE_BACKENDS = functools.reduce(DispatchKeySet.__or__, map(DispatchKeySet, _ABOVE))


def define(schema: str) -> torch._ops.OpOverload:
    """Define ``ercn::<schema>``, whose last argument is ``str backend``, where no library has; the table of backends
    answers its calls.

    It does so before any kernel of a device, libercn's own included: torch's key for that is BackendSelect. So every
    device has the op, and what a backend raises reaches the caller as it is; through the stable ABI it would not.
    """
    op = schema.partition("(")[0]
    if not hasattr(torch.ops.ercn, op):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.ercn, op).default
    expected = torch._C.parse_schema(f"ercn::{schema}")
    if str(overload._schema) != str(expected):
        raise ImportError(f"libercn was built from other sources, where {overload._schema}: install ercn again")
    DEFINED.append(overload)
    count = len(overload._schema.arguments)

    def kernel(*args):
        if len(args) < count:  # the dispatcher leaves out an argument that equals its default
            args += ("",)
        if next(x for x in args if isinstance(x, Tensor)).is_meta:
            return overload.redispatch(_META, *args)
        *args, backend = args
        return _backends.launch(op, backend, *args)

    for key in ("BackendSelect", "CompositeExplicitAutograd"):
        _LIBRARY.impl(op, kernel, key)
    _shard()
    return overload


def _shard() -> None:
    """Tell DTensor its rules for every op, where it is imported."""
    if "torch.distributed.tensor" in sys.modules:
        from ercn.ops import _sharding

        for overload in DEFINED:
            _sharding.register(overload)


Cast = Callable[[Callable[[Tensor | None], Tensor | None], tuple], tuple]


def autocast(overload: torch._ops.OpOverload, cast_arguments: Cast) -> None:
    """Under autocast run ``overload`` on ``cast_arguments(cast, args)``, ``cast`` being to autocast's dtype.

    ``torch.library.register_autocast`` fixes one dtype and casts every argument; this follows the dtype in force.
    float64 stays, as in torch's own autocast.
    """

    def kernel(*args, device: str, keys: DispatchKeySet):
        with _ExcludeDispatchKeyGuard(keys):
            return overload(*_casted(device, cast_arguments, args))

    for device in _DEVICES:
        keys = DispatchKeySet(getattr(DispatchKey, f"Autocast{device}"))
        of_device = functools.partial(kernel, device=device.lower(), keys=keys)
        _LIBRARY.impl(overload._schema.name.split("::")[-1], of_device, f"Autocast{device}")


def _casted(device: str, cast_arguments: Cast, args: tuple) -> tuple:
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        keep = tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        return tensor if keep else tensor.to(dtype)

    return cast_arguments(cast, args)


def autocasts(device: torch.device) -> bool:
    return (
        _is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


def run(overload: torch._ops.OpOverload, *args) -> Any:
    """The op below autograd and autocast; its kernel of libercn at once where the table would take it and nobody looks.

    It may be called like that for ops that libercn has, and whose CPU kernels take all arguments.
    """
    if (
        _backends.takes_cpu(args[-1])
        and all(map(_is_dense_cpu, args))
        and not _len_torch_dispatch_stack()
        and not _profiler_enabled()
        and not torch.jit.is_tracing()
    ):
        return overload.redispatch(cpu.KEY, *args)
    _shard()
    with _ExcludeDispatchKeyGuard(_ABOVE_BACKENDS):
        return overload(*args)


def _is_dense_cpu(x: Any) -> bool:
    """No subclass, no transform's wrapper, no lazy negation, nothing that the dispatcher would do more for."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return _dispatch_keys(x).raw_repr() in _DENSE_CPU
    return kind in _CONSTANTS


_CONSTANTS = {type(None), bool, float, list, str}

_DENSE_CPU = {_dispatch_keys(torch.empty(0, device="cpu")).raw_repr()}
with torch.inference_mode():
    _DENSE_CPU.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())


def join(
    overload: torch._ops.OpOverload,
    function: type[torch.autograd.Function],
    vmap: Callable,
    cast_arguments: Cast | None = None,
) -> Callable:
    """Register the op for autograd, vmap and autocast, and return how a public function calls it: the op itself in a
    compiled graph; in eager mode ``function``, whose overhead is a fraction of that and which ``torch.func`` knows.

    function: has setup_context, backward and jvp for the op's arguments; forward and vmap come from here.
    vmap: (op, info, in_dims, *args) -> outputs, their dimensions; ``op`` is what it calls.
    """
    torch.library.register_autograd(overload, function.backward, setup_context=function.setup_context)
    torch.library.register_vmap(overload, functools.partial(vmap, overload))
    if cast_arguments is not None:
        autocast(overload, cast_arguments)
    function.forward = staticmethod(functools.partial(run, overload))

    def call(*args):
        if torch.jit.is_tracing() or torch.compiler.is_compiling() and forward_ad._current_level < 0:
            return overload(*args)  # which has no tangent
        if cast_arguments is not None and autocasts(args[0].device):
            args = _casted(args[0].device.type, cast_arguments, args)
        if _are_functorch_transforms_active():
            return function.apply(*args)
        if forward_ad._current_level >= 0 or torch.is_grad_enabled() and any(map(_requires_grad, args)):
            return single(*args)
        return run(overload, *args)

    function.vmap = staticmethod(functools.partial(vmap, call))
    single = _single_level(function).apply
    return call


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether plain tensors are computed with as they come: nothing compiles, transforms, casts or is a subclass."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _is_any_autocast_enabled()
        and all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
    )


def is_readable(x: Tensor) -> bool:
    """Whether Python can read the values of x: they are there, on the CPU, and nothing traces or compiles."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_sharded(x: Tensor) -> bool:
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(x, dtensor.DTensor)


def save_for_forward(ctx: torch.autograd.function.FunctionCtx, *tensors: Tensor) -> None:
    if forward_ad._current_level >= 0:  # else they would be kept for nothing
        ctx.save_for_forward(*tensors)


def _requires_grad(x: Any) -> bool:
    return type(x) not in _CONSTANTS and x.requires_grad


def _single_level(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same for plain autograd alone: torch binds the arguments of a Function with ``setup_context`` anew at every
    call, which takes 10 µs."""

    def forward(ctx, *args):
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs

    body = {"forward": staticmethod(forward), "setup_context": staticmethod(_SingleLevelFunction.setup_context)}
    return type(function.__name__, (function,), body)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Forward-mode AD through the op raises: torch.library would return tangents of 0 without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"ercn::{op} has no forward-mode derivative (jvp); use reverse mode (backward)")


def fold(in_dim: int | None, size: int, x: Tensor | None) -> Tensor | None:
    """[B, …] with a vmapped dimension, or without one -> [size·B, …]."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return x.reshape(-1, *x.shape[2:])


def loop(op: Callable, size: int, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """vmap of an op with several outputs by running it once per slice."""
    slices = (
        op(*(x.select(dim, i) if isinstance(dim, int) else x for dim, x in zip(in_dims, args))) for i in range(size)
    )
    outputs = tuple(torch.stack(parts) for parts in zip(*slices))
    return outputs, (0,) * len(outputs)
