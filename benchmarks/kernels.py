"""Kernels of libercn_cuda that a call launches, with registers, shared memory and occupancy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ercn.benchmarks.results import Row
from ercn.ops import _extension, cuda


def attributes() -> list[dict[str, Any]]:
    """Attributes of every kernel of libercn_cuda; launch counts alone where the device does not answer, as after a
    sticky error.
    """
    try:
        return _extension.cuda_kernels(attributes=True)
    except RuntimeError as error:
        return [kernel | {"absent": str(error)} for kernel in _extension.cuda_kernels()]


@contextlib.contextmanager
def launched() -> Iterator[list[dict[str, Any]]]:
    """A list that receives, when the block ends, the attributes of every kernel launched in it, or the reason why
    they are unknown.
    """
    found: list[dict[str, Any]] = []
    if cuda.unavailable():
        yield found
        return
    before = {kernel["name"]: kernel["launches"] for kernel in _extension.cuda_kernels()}
    yield found
    for kernel in attributes():
        launches = kernel["launches"] - before[kernel["name"]]
        if launches > 0:
            found.append(kernel | {"launches": launches})


def described(rows: list[Row]) -> list[str]:
    """A sentence for every kernel of the rows, from its first launch."""
    kernels = {kernel["name"]: kernel for row in reversed(rows) for kernel in row.get("kernels") or ()}
    return [f"{name.removeprefix('ercn::')}: {_attributes(k)}" for name, k in sorted(kernels.items())]


def _attributes(k: dict[str, Any]) -> str:
    if "absent" in k:
        return k["absent"]
    return (
        f"{k['registers']} registers, {k['local_bytes']} bytes local, "
        f"{k['static_shared_bytes'] + k['dynamic_shared_bytes']:,} bytes shared, {k['threads']} threads, "
        f"{k['blocks_per_multiprocessor']} blocks a multiprocessor"
    )
