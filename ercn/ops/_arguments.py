"""The arguments of the attention pool's ops, written once: schemas, counts and positions follow."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PoolArguments(NamedTuple):
    """What each op of the pool takes, in the order of its schema; ``ercn.ops.gated_attention_pool`` has the shapes.

    The same tuple holds what belongs to each argument: its shape, its vmapped dimension, its placement.
    """

    h: Tensor
    v_weight: Tensor
    v_bias: Tensor | None
    u_weight: Tensor | None
    u_bias: Tensor | None
    w_weight: Tensor
    w_bias: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None
    dropout_p: float
    activation: str

    @classmethod
    def split(cls, args: Sequence[Any]) -> tuple["PoolArguments", Sequence[Any]]:
        """Arguments of an op from h on: the pool's, and those that follow."""
        return cls(*args[:_COUNT]), args[_COUNT:]


_FIELDS = PoolArguments._fields
_COUNT = len(_FIELDS)
DIFFERENTIABLE = _FIELDS[: _FIELDS.index("mask")]  # h and the weights
TENSORS = slice(0, _FIELDS.index("dropout_p"))
SETTINGS = slice(_FIELDS.index("dropout_p"), _COUNT)

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", str: "str"}
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in PoolArguments.__annotations__.items())


@functools.cache
def position(op: str, name: str) -> int:
    """Where ``ercn::op`` has the argument ``name``."""
    schema = getattr(torch.ops.ercn, op).default._schema
    return [argument.name for argument in schema.arguments].index(name)
