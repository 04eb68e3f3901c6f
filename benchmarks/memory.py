"""Peak extra memory of one call: the most that the process or the GPU holds, less what it held before.

On a GPU torch's allocator counts it. On a CPU a fresh process runs the variant alone: the kernel's high-water mark of
resident memory is reset after the inputs exist, so results, temporaries and the libraries' own buffers all count.
(``ru_maxrss`` would not do: it survives exec and cannot be reset.)
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ercn._memory import RESERVE, free_bytes, resident_bytes
from ercn.benchmarks.cases import Case


def does_not_fit(needed: float, held: float, device: str) -> str | None:
    """A sentence where ``needed`` bytes, beside ``held`` ones that others will take, exceed the free memory."""
    free = free_bytes(device)
    if free is None or needed <= RESERVE * free - held:
        return None
    taken = f", of which {held / 1e9:.1f} GB go to variants that take turns with it" if held else ""
    return f"does not fit: needs {needed / 1e9:.1f} GB by arithmetic, {free / 1e9:.1f} GB are free{taken}"


def cuda_peak(make: Callable[[], Callable[[], object]]) -> int:
    """Peak extra bytes of calling the result of ``make``."""
    run = make()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(case: Case, variant: str, threads: int) -> int:
    """Peak extra bytes of the variant's call in a fresh process; OSError where this system cannot tell."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = _server().Process(target=_measure, args=(sender, case, variant, threads), daemon=False)
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        answer = f"the measuring process ended with code {child.exitcode}"
    child.join()
    if isinstance(answer, str):
        raise OSError(answer)
    return answer


@cache
def _server() -> multiprocessing.context.BaseContext:
    """Children are forks of a process that has imported torch and its compiler and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ercn.benchmarks.variants", "torch._inductor.compile_fx"])
    return context


def _measure(sender, case: Case, variant: str, threads: int) -> None:
    try:
        sender.send(_peak_here(case, variant, threads))
    except Exception as error:  # noqa: BLE001 - whatever goes wrong here is the answer
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def _peak_here(case: Case, variant: str, threads: int) -> int:
    from ercn.benchmarks.settings import SETTINGS, precision
    from ercn.benchmarks.variants import inputs_of, variants

    torch.set_num_threads(threads)
    chosen = next(v for v in variants(case, "cpu", also=SETTINGS) if v.name == variant)
    with precision(case.dtype):
        inputs = inputs_of(case, "cpu")
        if variant == "compile":  # the compiler's own memory is not the program's
            run = chosen.make(case, inputs)
            run()
        else:
            tiny = case.tiny()
            chosen.make(tiny, inputs_of(tiny, "cpu"))()  # thread pools and libraries start up
            run = chosen.make(case, inputs)
        gc.collect()
        _trim()
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        run()
        return max(0, resident_bytes("VmHWM") - before)


def _trim() -> None:
    """Give freed heap pages back, which would otherwise be used again uncounted."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
