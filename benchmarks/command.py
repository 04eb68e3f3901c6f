"""``ercn bench``: measure, compare, plot, or write the README's performance section.

The standard library reads the options, so that a machine for measuring needs little besides torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ercn.benchmarks.cases import OPS
from ercn.benchmarks.config import BenchConfig, CompareConfig, PlotConfig, ReadmeConfig
from ercn.cli import field_help

TOOLS: dict[str, tuple[str, type]] = {
    "compare": ("ercn.benchmarks.compare", CompareConfig),
    "plot": ("ercn.benchmarks.plots", PlotConfig),
    "readme": ("ercn.benchmarks.readme", ReadmeConfig),
}
DESCRIPTION = (
    "Measure the operators and the network beside plain torch, in turn, on the same data: median time, memory, error. "
    "ercn bench compare | plot | readme FILE… work on saved results; each has its own --help."
)


def bench(argv: Sequence[str]) -> int:
    """Runs ``ercn bench`` with these arguments; the exit code is 1 where ``compare`` finds something slower."""
    first = argv[0] if argv else ""
    if first in TOOLS:
        module, cls = TOOLS[first]
        config = _parse(f"bench {first}", cls, "files", argv[1:])
        return getattr(import_module(module), first)(config)
    config = _parse("bench", BenchConfig, "op", argv)
    if config.op not in (*OPS, "all"):
        raise ValueError(f"{config.op!r} is no op of ercn bench; there are {', '.join((*OPS, 'all', *TOOLS))}")
    import_module("ercn.benchmarks.run").run(config)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def _parse(command: str, cls: type, positional: str, argv: Sequence[str]) -> Any:
    description = DESCRIPTION if cls is BenchConfig else (cls.__doc__ or "").split("\n\n")[0].replace("``", "")
    parser = _Parser(prog=f"ercn {command}", description=description, allow_abbrev=False)
    hints, texts = get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        name = field.name if field.name == positional else f"--{field.name}"
        parser.add_argument(name, **_options(field, hints[field.name], positional), help=texts[field.name])
    values = vars(parser.parse_args(argv))
    if positional == "files":
        values["files"] = tuple(values["files"])
    return cls(**values)


def _options(field: dataclasses.Field, hint: Any, positional: str) -> dict[str, Any]:
    if field.name == positional == "files":
        return {"nargs": "+"}
    if field.name == positional:
        return {"nargs": "?", "default": field.default}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true", "default": field.default}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "default": field.default}
    return {"type": hint, "default": field.default}
