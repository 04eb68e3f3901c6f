"""Registration of an op with torch: schema, fake, kernels of the table of backends, autograd, autocast and vmap."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
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
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.jit._trace import is_tracing

from ercn.ops import _backends, _extension, cpu
from ercn.ops._arguments import position

_extension.load()  # libercn defines the schemas; where it is absent, ``define`` does
_LIBRARY = torch.library.Library("ercn", "FRAGMENT")
DEFINED: list[torch._ops.OpOverload] = []
_META = DispatchKeySet(DispatchKey.Meta)
_AUTOCAST = {device: getattr(DispatchKey, f"Autocast{device}") for device in ("CPU", "CUDA", "XPU", "MPS")}
_ABOVE = (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor)
_ABOVE_BACKENDS = functools.reduce(DispatchKeySet.__or__, map(DispatchKeySet, (*_ABOVE, *_AUTOCAST.values())))


def define(schema: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``ercn::<schema>``, whose last argument is ``str backend``, unless libercn has; its calls go to the table
    of backends.

    They do so at torch's key BackendSelect, before the kernel of any device, libercn's own included. So every device
    has the op, and the exception of a backend reaches the caller unchanged, which the stable ABI does not allow.
    """
    op = schema.partition("(")[0]
    if not hasattr(torch.ops.ercn, op):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload: torch._ops.OpOverload = getattr(torch.ops.ercn, op).default
    expected = torch._C.parse_schema(f"ercn::{schema}")
    if str(overload._schema) != str(expected):
        raise ImportError(f"libercn was built from other sources, where {overload._schema}: install ercn again")
    DEFINED.append(overload)
    count = len(overload._schema.arguments)

    def kernel(*args: Any) -> Any:
        if len(args) < count:  # the dispatcher omits an argument that equals its default
            args += ("",)
        if next(x for x in args if isinstance(x, Tensor)).is_meta:
            return overload.redispatch(_META, *args)
        return _backends.launch(op, args[-1], *args[:-1])

    for key in ("BackendSelect", "CompositeExplicitAutograd"):
        _LIBRARY.impl(op, kernel, key)
    torch.library.register_fake(overload)(fake)
    _shard()
    return overload


def _shard() -> None:
    """Register the DTensor rules of every op once DTensor is imported."""
    if "torch.distributed.tensor" in sys.modules:
        from ercn.ops import _sharding

        for overload in DEFINED:
            _sharding.register(overload)


def _register_autocast(overload: torch._ops.OpOverload, casts: frozenset[int]) -> None:
    """Under autocast run ``overload`` with the arguments at ``casts`` in autocast's dtype.

    ``torch.library.register_autocast`` fixes one dtype and casts every argument; this follows the dtype in force.
    """

    def kernel(*args: Any, device: str, keys: DispatchKeySet) -> Any:
        with _ExcludeDispatchKeyGuard(keys):
            return overload(*_casted(device, casts, args))

    for device, key in _AUTOCAST.items():
        of_device = functools.partial(kernel, device=device.lower(), keys=DispatchKeySet(key))
        _LIBRARY.impl(overload._opname, of_device, f"Autocast{device}")


def _casted(device: str, casts: frozenset[int], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As in torch's own autocast, float64 stays."""
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)

    return tuple(cast(x) if i in casts else x for i, x in enumerate(args))


def autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def run(overload: torch._ops.OpOverload, *args: Any) -> Any:
    """Call the op below autograd and autocast.

    Where the table would take libercn's kernel, and no mode, profiler or trace observes the call, the kernel is called
    at once. So ``overload`` must be an op of libercn whose CPU kernel takes all arguments.
    """
    if (
        _backends.takes_cpu(args[-1])
        and all(map(_is_dense_cpu, args))
        and not _len_torch_dispatch_stack()
        and not _profiler_enabled()
        and not is_tracing()
    ):
        return overload.redispatch(cpu.KEY, *args)
    _shard()
    with _ExcludeDispatchKeyGuard(_ABOVE_BACKENDS):
        return overload(*args)


def _is_dense_cpu(x: Any) -> bool:
    """A constant, or a tensor with no other dispatch keys: no subclass, no wrapper of a transform, no lazy negation."""
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
    vmap: Callable[..., tuple[Any, Any]],
    casts: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register autograd, vmap and autocast of the op, and return how a public function calls it: in a compiled graph
    the op itself; in eager mode ``function``, which costs a fraction of that and supports ``torch.func``.

    function: setup_context, backward and jvp for the arguments of the op; forward and vmap are added here.
    vmap: (op, info, in_dims, *args) -> outputs and their dimensions; it calls ``op``.
    casts: the arguments that autocast casts.
    """
    positions = frozenset(position(overload._opname, name) for name in casts)
    torch.library.register_autograd(overload, function.backward, setup_context=function.setup_context)
    torch.library.register_vmap(overload, functools.partial(vmap, overload))
    if positions:
        _register_autocast(overload, positions)

    def call(*args: Any) -> Any:
        if is_tracing() or torch.compiler.is_compiling() and forward_ad._current_level < 0:
            return overload(*args)  # it has no jvp
        if positions and _is_any_autocast_enabled() and autocasts(args[0].device):
            args = _casted(args[0].device.type, positions, args)
        if _are_functorch_transforms_active():
            return transformed(*args)
        if forward_ad._current_level >= 0 or torch.is_grad_enabled() and any(map(_requires_grad, args)):
            return single_level(*args)
        return run(overload, *args)

    forward = functools.partial(run, overload)
    methods = {"forward": staticmethod(forward), "vmap": staticmethod(functools.partial(vmap, call))}
    complete: Any = type(function.__name__, (function,), methods)
    transformed = complete.apply
    single_level = _single_level(complete).apply
    return call


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether the tensors are plain, in eager mode without transforms and autocast."""
    return (
        not torch.compiler.is_compiling()
        and not is_tracing()
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _is_any_autocast_enabled()
        and all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
    )


def is_readable(x: Tensor) -> bool:
    """Whether Python can read the values of x: they are on the CPU, and nothing traces or compiles."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_tracing()
        and not _len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_sharded(x: Tensor) -> bool:
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(x, dtensor.DTensor)


def save_for_forward(ctx: Any, *tensors: Tensor | None) -> None:
    if forward_ad._current_level >= 0:  # without forward mode the memory would be kept for nothing
        ctx.save_for_forward(*tensors)


def _requires_grad(x: Any) -> bool:
    return type(x) not in _CONSTANTS and x.requires_grad


def _single_level(function: Any) -> Any:
    """``function`` for plain autograd, without the 10 µs in which torch binds the arguments of a Function that has
    ``setup_context``."""

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        return outputs

    body = {"forward": staticmethod(forward), "setup_context": staticmethod(_SingleLevelFunction.setup_context)}
    return type(function.__name__, (function,), body)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise on forward-mode AD through the op, for which torch.library returns tangents of 0 silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"ercn::{op} has no forward-mode derivative (jvp); use reverse mode (backward)")


def fold(in_dim: int | None, size: int, x: Any) -> Any:
    """x [B, …] with the vmapped dimension ``in_dim``, or without one (None) -> [size·B, …]; not a tensor: unchanged."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return x.reshape(-1, *x.shape[2:])


def unfold(outputs: Any, size: int) -> tuple[Any, Any]:
    """The outputs of an op on folded arguments, and their vmapped dimensions: 0, or None for an empty gradient [0]."""
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, -1)), 0
    dims = tuple(None if x.dim() == 1 else 0 for x in outputs)
    return tuple(x if dim is None else x.unflatten(0, (size, -1)) for x, dim in zip(outputs, dims)), dims


def loop(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """vmap of any op, once for each slice."""
    slices = [
        op(*(x.select(dim, i) if isinstance(dim, int) else x for dim, x in zip(in_dims, args)))
        for i in range(info.batch_size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    outputs = tuple(torch.stack(parts) for parts in zip(*slices))
    return outputs, (0,) * len(outputs)
