"""Configuration of ``ercn bench`` and its three tools, as frozen dataclasses with the command line's option names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ercn.config import Config


@dataclass(frozen=True)
class BenchConfig(Config):
    """``ercn bench OP``: time, memory and error beside plain torch.

    Args:
        op: affinity, mil, refinement, walk, model, overhead (100 small calls: what one costs on the host) or all.
        device: "auto" takes the GPU where torch can use one.
        backend: measure only this one of ours (ercn doctor lists them), besides the baselines.
        direction: measure only this one.
        dtype: measure only this one.
        also: settings, separated by commas, in which our compiled backend takes turns with itself. On the CPU:
            one_thread, the instruction sets portable, avx2 and avx512, and float32 (on float32 copies of the inputs);
            on a GPU: the cuda backend's kernels generic and sm90_dense.
        without: variants to leave out, separated by commas, such as compile,blockwise.
        filter: only cases whose id contains a match of this regular expression.
        quick: a few small cases, few rounds.
        full: every registered case instead of the standard ones.
        seconds: to spend on the rounds of each case.
        rounds: the least number of rounds of each case.
        threads: of torch on the CPU; 0 leaves torch's own number.
        memory: measure peak memory too.
        check: compare with float64 first, which takes minutes for large networks.
        list: print the ids of the chosen cases and stop.
        save: FILE.csv for the results (``ercn.benchmarks.results``); rows appear in FILE.jsonl while it runs.
    """

    op: str = "all"
    device: str = "auto"
    backend: str = ""
    direction: Literal["forward", "backward", "forward_backward", "all"] = "all"
    dtype: Literal["float32", "tf32", "bfloat16", "float16", "all"] = "all"
    also: str = ""
    without: str = ""
    filter: str = ""
    quick: bool = False
    full: bool = False
    seconds: float = 4.0
    rounds: int = 5
    threads: int = 0
    memory: bool = True
    check: bool = True
    list: bool = False
    save: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save and not self.save.endswith(".csv"):
            raise ValueError(f"save must name a .csv file; got {self.save!r}")


@dataclass(frozen=True)
class FilesConfig(Config):
    """Base of the tools' configurations: result files of ``ercn bench --save``."""

    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError("files is empty; name the result files that ercn bench --save wrote")


@dataclass(frozen=True)
class CompareConfig(FilesConfig):
    """``ercn bench compare BEFORE AFTER``: exit code 1 where something became slower.

    Args:
        files: two result files.
        metric: "ratio" compares times relative to the case's own baseline product, which cancels the machine's speed;
            "time" compares milliseconds.
        threshold: a change below this factor is never a verdict.
    """

    metric: Literal["ratio", "time"] = "ratio"
    threshold: float = 1.1


@dataclass(frozen=True)
class PlotConfig(FilesConfig):
    """``ercn bench plot FILE…``: figures of one file, or of several side by side, as PNG and SVG.

    Args:
        files: result files.
        out: folder for the figures.
    """

    out: str = "runs/bench"


@dataclass(frozen=True)
class ReadmeConfig(FilesConfig):
    """``ercn bench readme FILE…``: writes the performance section from result files.

    Args:
        files: result files; they should be committed.
        readme: the file with the two marker comments.
    """

    readme: str = "docs/performance.md"
