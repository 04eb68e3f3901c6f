"""How an op joins torch: one schema, one Python kernel per device, autocast, and help for vmap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import forward_ad

from ercn.ops import _backends

_LIBRARY = torch.library.Library("ercn", "FRAGMENT")
_DEVICES = ("CPU", "CUDA")


def define(schema: str) -> torch._ops.OpOverload:
    """Define ``ercn::<schema>``, whose last argument is ``str backend``; its kernel asks the backend table."""
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = name.split("::")[-1]

    def kernel(*args):
        if len(args) < count:  # the dispatcher leaves out an argument that equals its default
            args += ("",)
        *args, backend = args
        return _backends.launch(op, backend, *args)

    for device in _DEVICES:
        _LIBRARY.impl(op, kernel, device)
    overload = getattr(torch.ops.ercn, op).default
    count = len(overload._schema.arguments)
    return overload


def autocast(overload: torch._ops.OpOverload, cast_arguments: Callable[[Callable, tuple], tuple]) -> None:
    """Under autocast run ``overload`` on ``cast_arguments(cast, args)``, ``cast`` being to autocast's dtype.

    ``torch.library.register_autocast`` fixes one dtype and casts every argument; this follows the dtype in force.
    float64 stays, as in torch's own autocast.
    """
    for device in _DEVICES:
        key = getattr(DispatchKey, "Autocast" + device)

        def kernel(*args, key=key, device=device):
            dtype = torch.get_autocast_dtype(device.lower())

            def cast(tensor: Tensor | None) -> Tensor | None:
                keep = tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
                return tensor if keep else tensor.to(dtype)

            with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
                return overload(*cast_arguments(cast, args))

        _LIBRARY.impl(overload._schema.name.split("::")[-1], kernel, key.name)


def refuse_double_backward(overload: torch._ops.OpOverload) -> None:
    """Gradients of ``overload``, itself a backward, raise instead of being silently absent."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{overload._schema.name} has no derivative: double backward is not implemented; "
            "differentiate a plain-torch composition of the op instead"
        )

    torch.library.register_autograd(overload, backward, lib=_LIBRARY)


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


def loop(overload: torch._ops.OpOverload, size: int, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """vmap of an op with several outputs by running it once per slice."""
    slices = (
        overload(*(x if dim is None else x.select(dim, i) for dim, x in zip(in_dims, args))) for i in range(size)
    )
    outputs = tuple(torch.stack(parts) for parts in zip(*slices))
    return outputs, (0,) * len(outputs)
