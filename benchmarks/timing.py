"""Interleaved timing: in every round each variant runs once, so that a change of the machine's speed hits all alike.

The order is drawn anew in every round, since a variant's caches depend on the one before it.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Runners = Mapping[str, Callable[[], object]]

GRAPH_BELOW_MS = 0.1  # launches shorter than this are also timed as a replayed CUDA graph
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
METHOD = {
    "cpu": "time.perf_counter around each call, after one untimed call; variants take turns, in a new order every "
    "round; glibc's malloc keeps freed blocks below 32 MB",
    "cuda": "CUDA events around each call, which include its launches; 256 MB are written before each call so that L2 "
    "is cold; variants take turns, in a new order every round. graph_ms replays a CUDA graph of 20 calls, without "
    "launches and with a warm L2",
}


def interleave(
    runners: Runners, device: str, *, seconds: float, min_rounds: int, max_rounds: int = 1000
) -> dict[str, list[float]]:
    """Milliseconds of every round of each runner. Rounds end after ``seconds`` but not before ``min_rounds``.

    On the GPU the clock starts once the caches are flushed; see ``METHOD``. Every runner must have run before.
    """
    once = _once_cuda() if device == "cuda" else _once_cpu
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order, draw = list(runners), random.Random(0)
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start >= seconds:
            break
        draw.shuffle(order)
        for name in order:
            samples[name].append(once(runners[name]))
    return samples


def keep_freed_memory() -> None:
    """Memory that a variant frees stays with the process, or the next one would pay for mapping it anew.

    With glibc's own settings eager's large blocks make it give back the rest of the heap, and 600 page faults, a
    millisecond or more, are charged to the next variant. Blocks of 32 MB and more are mapped and unmapped as always.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)


def _once_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _once_cuda() -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(run: Callable[[], object]) -> float:
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return once


def graph_ms(run: Callable[[], object], *, calls: int = 20, replays: int = 10) -> float:
    """Milliseconds per call of ``calls`` calls captured in one CUDA graph; median of the replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture needs every lazy initialisation done on a side stream
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / calls)
    return statistics.median(samples)


def summary(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile (nearest rank)."""
    ordered = sorted(samples)

    def rank(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return statistics.median(ordered), rank(0.2), rank(0.8)


def paired_ratio(samples: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80 over the rounds of time / baseline's time in the same round."""
    return summary([a / b for a, b in zip(samples, baseline)])
