"""The command line: every command is a function with a configuration, whose fields are the options.

A value comes from, last one wins: the default, ``--preset`` (train and plan), ``--config FILE.yaml``, the option
itself. Errors of the user end with one line and exit code 2; ``--debug`` or ERCN_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from ercn import config as configs
from ercn.benchmarks import config as bench_configs

TRAIN_EXTRA = "pip install 'ercn[train]'"
BENCH_EXTRA = "pip install 'ercn[bench]'"
EXPORT_EXTRA = "pip install 'ercn[export]'"
COMMANDS: dict[str, tuple[str, type]] = {
    "prepare": ("ercn.data", configs.PrepareConfig),
    "plan": ("ercn.training.planning", configs.PlanConfig),
    "pretrain": ("ercn.training.pretraining", configs.PretrainConfig),
    "train": ("ercn.training.fit", configs.TrainConfig),
    "evaluate": ("ercn.evaluation.evaluating", configs.EvaluateConfig),
    "predict": ("ercn.evaluation.predicting", configs.PredictConfig),
    "export": ("ercn.export", configs.ExportConfig),
    "report": ("ercn.report.page", configs.ReportConfig),
    "ablate": ("ercn.ablation.runner", configs.AblateConfig),
    "select": ("ercn.ablation.selection", configs.SelectConfig),
    "ceiling": ("ercn.training.ceiling", configs.CeilingConfig),
    "bench": ("ercn.benchmarks.run", bench_configs.BenchConfig),
    "bench compare": ("ercn.benchmarks.compare", bench_configs.CompareConfig),
    "bench plot": ("ercn.benchmarks.plots", bench_configs.PlotConfig),
    "bench readme": ("ercn.benchmarks.readme", bench_configs.ReadmeConfig),
}
FUNCTIONS = {"ceiling": "train_ceiling", "bench": "run"}  # the others have the last word of their command
# The field that positional arguments fill.
POSITIONAL = {"report": "runs", "bench": "op", "bench compare": "files", "bench plot": "files", "bench readme": "files"}
SUMMARIES = {
    "prepare": "find the fundus disc, crop and cache a data set, split it by patient",
    "plan": "predict the peak memory of a training, and say what to change",
    "pretrain": "contrastive pre-training of the backbone (SimCLR or MoCo v2)",
    "train": "train ERCN on image labels",
    "evaluate": "metrics with intervals, localisation against lesion masks, HTML report",
    "predict": "grades and full-resolution heat maps of any pictures",
    "export": "a network and a script for use without ercn: ONNX, torch or C++",
    "report": "compare runs in one self-contained HTML page: ercn report RUN RUN …",
    "ablate": "train and evaluate a grid of configurations and seeds, one table",
    "select": "choose a configuration of a grid on validation, without the test split",
    "ceiling": "train a U-Net on lesion masks, the ceiling of maps from grades alone",
    "bench": "time, memory and error of the operators and the network beside plain torch",
    "bench compare": "what became slower or faster between two results: ercn bench compare BEFORE AFTER",
    "bench plot": "figures of results: ercn bench plot FILE …",
    "bench readme": "write the performance section from results: ercn bench readme FILE …",
    "doctor": "what is installed, which backends run here, and why others do not",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done; 1 ``doctor`` found a fault, ``plan`` no room or ``bench compare`` something
    slower; 2 wrong input or no memory; 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("ERCN_DEBUG", "") not in ("", "0")
    argv = [a for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    try:
        sys.exit(_run(argv[0], argv[1:]))
    except KeyboardInterrupt:
        print(_interrupted(argv), file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").split(".")[0] == "ercn":
            raise
        extra = BENCH_EXTRA if argv[0] == "bench" else EXPORT_EXTRA if "onnx" in (error.name or "") else TRAIN_EXTRA
        print(f"error: {error.name} is not installed; this command needs {extra}", file=sys.stderr)
        sys.exit(2)


def _run(command: str, argv: list[str]) -> int:
    if command == "--version":
        print(importlib.import_module("ercn").__version__)
        return 0
    if command == "doctor":
        return _doctor(argv)
    if argv and f"{command} {argv[0]}" in COMMANDS:
        command, argv = f"{command} {argv[0]}", argv[1:]
    if command not in COMMANDS:
        raise ValueError(f"{command!r} is no command; there are {', '.join(SUMMARIES)}")
    module, cls = COMMANDS[command]
    config = parse(command, cls, argv)
    result = _function(module, FUNCTIONS.get(command, command.split()[-1]))(config)
    if isinstance(result, Path):
        print(result)
    return result if isinstance(result, int) else 0


def _function(module: str, name: str) -> Callable[[Any], Any]:
    return getattr(importlib.import_module(module), name)


def parse(command: str, cls: type, argv: Sequence[str]) -> Any:
    """The configuration object of a command from its arguments; ValueError names the option that is wrong."""
    from jsonargparse import ArgumentError

    preset, argv = _take_preset(argv) if issubclass(cls, configs.TrainConfig) else (None, argv)
    _check_arguments(command, cls, argv)
    parser = _parser(command, cls, None if preset is None else dataclasses.asdict(configs.preset(preset)))
    try:
        values = parser.parse_args(list(argv)).clone(with_meta=False).as_dict()
    except ArgumentError as error:
        key, colon, reason = str(error).removeprefix('Parser key "').partition('":')
        text = f"--{key}: {reason}" if colon else str(error)
        text = " ".join(text.split()).replace("<class '", "").replace("'>", "").replace("typing.", "")
        raise ValueError(f"{text}; ercn {command} --help lists the options") from error
    del values["config"]
    return configs.from_dict(cls, values)


def _check_arguments(command: str, cls: type, argv: Sequence[str]) -> None:
    """ValueError where a value could only be misunderstood."""
    given = [argument.partition("=")[0] for argument in argv]
    positional = f"--{POSITIONAL.get(command)}"
    if positional in given and not argv[0].startswith("-"):
        raise ValueError(f"{argv[0]!r} and {positional} give the same field; give one of them")
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and f"--{name}" in given:
            at = given.index(f"--{name}")
            value = argv[at].partition("=")[2] or "".join(argv[at + 1 : at + 2])
            if not Path(value).is_file():
                options = ", ".join(f"--{name}.{field.name}" for field in dataclasses.fields(hint))
                raise ValueError(f"--{name} takes a YAML file of its options; got {value!r}. The options are {options}")


def _parser(command: str, cls: type, defaults: dict[str, Any] | None) -> Any:
    from argparse import SUPPRESS

    import docstring_parser
    from jsonargparse import ActionYesNo, ArgumentParser

    summary, positional = SUMMARIES[command], POSITIONAL.get(command)
    parser = ArgumentParser(
        prog=f"ercn {command}",
        usage=f"ercn {command} [{positional.upper()}] [OPTIONS]" if positional else f"ercn {command} [OPTIONS]",
        description=f"{summary[0].upper()}{summary[1:]}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options; later options win")
    flags = {f.name: f.default for f in dataclasses.fields(cls) if f.type == "bool"} if command == "bench" else {}
    parser.add_class_arguments(cls, skip=set(flags), default=defaults)
    for name, group in parser.groups.items():
        group.title = name
    help_texts = {param.arg_name: param.description for param in docstring_parser.parse(cls.__doc__ or "").params}
    for name, default in flags.items():  # --quick and --no-memory take no value
        switch = ActionYesNo(no_prefix="no-")
        parser.add_argument(f"--{name}", action=switch, default=default, help=help_texts[name])
    if positional:
        nargs = "?" if command == "bench" else "*"
        parser.add_argument(positional, nargs=nargs, type=str, default=SUPPRESS, help=f"the same as --{positional}")
    if issubclass(cls, configs.TrainConfig):
        parser.epilog = "--preset ercn, seam or chikontwe starts from a packaged recipe instead of the defaults."
    if command == "bench":
        parser.epilog = "ercn bench compare | plot | readme FILE… read saved results; each has its own --help."
    return parser


def _take_preset(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The preset's name and the arguments without it: the parser must know its defaults first."""
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", const="")
    known, rest = parser.parse_known_args(list(argv))
    return known.preset, rest


def _doctor(argv: list[str]) -> int:
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="ercn doctor", description=f"Show {SUMMARIES['doctor']}.")
    parser.add_argument("--selftest", action="store_true", help="also compare every backend with the reference")
    return _function("ercn.doctor", "doctor")(selftest=parser.parse_args(argv).selftest)


def _overview() -> str:
    commands = "\n".join(f"  {name:<15}{text}" for name, text in SUMMARIES.items())
    return (
        "usage: ercn COMMAND [OPTIONS]\n\n"
        "Grading of diabetic retinopathy from image labels, with heat maps.\n\n"
        f"commands:\n{commands}\n\n"
        "ercn COMMAND --help lists the options; --print_config writes them as YAML, --config reads them.\n"
        "--debug shows the traceback of an error; --version prints the version.\n\n"
        "For research only. Not a medical device."
    )


def _interrupted(argv: list[str]) -> str:
    if argv[0] in ("pretrain", "train", "ceiling"):
        again = shlex.join(["ercn", *argv, *([] if any("run.resume" in a for a in argv) else ["--run.resume", "true"])])
        return f"\ninterrupted; finished epochs are kept. Go on with:\n  {again}"
    cells = argv[0] in ("ablate", "select")
    return "\ninterrupted" + ("; finished cells are kept, the same command goes on" if cells else "")
