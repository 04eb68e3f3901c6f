"""``ercn bench``: measure, compare, plot, or write the README's performance section."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_type_hints

from ercn.benchmarks.cases import OPS
from ercn.benchmarks.config import BenchConfig, CompareConfig, PlotConfig, ReadmeConfig
from ercn.cli import field_help, parse_or_explain

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


def _parse(command: str, cls: type, positional: str, argv: Sequence[str]) -> Any:
    from jsonargparse import ArgumentParser

    description = DESCRIPTION if cls is BenchConfig else (cls.__doc__ or "").split("\n\n")[0].replace("``", "")
    parser = ArgumentParser(prog=f"ercn {command}", description=description, exit_on_error=False)
    hints, texts = get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        parser.add_argument(*_argument(field, positional), **_options(field, hints[field.name], positional, texts))
    values = parse_or_explain(parser, argv, command)
    if positional == "files":
        values["files"] = tuple(values["files"])
    return cls(**values)


def _argument(field: dataclasses.Field, positional: str) -> tuple[str]:
    return (field.name if field.name == positional else f"--{field.name}",)


def _options(field: dataclasses.Field, hint: Any, positional: str, texts: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"help": texts[field.name]}
    if field.name == positional == "files":
        return options | {"nargs": "+", "type": str}
    if field.name == positional:
        return options | {"nargs": "?", "type": str, "default": field.default}
    if hint is bool and not field.default:
        return options | {"action": "store_true"}
    return options | {"type": hint, "default": field.default}
