"""Clocks, power, temperature, throttling and memory of an NVIDIA GPU during a call, through NVML."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL_S = 0.05
# nvmlClocksEventReasons*, by bit.
THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Telemetry:
    """A context that samples in a thread; ``.summary()`` afterwards. ``reason`` says why there is nothing to sample."""

    def __init__(self, device: str, index: int = 0) -> None:
        self.reason: str | None = None
        self.samples: list[dict[str, float]] = []
        self._nvml, self._handle = None, None
        if device != "cuda":
            self.reason = "no NVIDIA GPU is measured"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        except ModuleNotFoundError:
            self.reason = "nvidia-ml-py is not installed: pip install 'ercn[bench]'"
        except Exception as error:  # noqa: BLE001 - NVML raises its own classes; all mean that it cannot be asked
            self.reason = f"NVML cannot be asked: {error}"

    def sample(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        return {
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "memory_used_mb": nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6,
            "throttle": nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }

    def __enter__(self):
        self.samples = []
        if self.reason is None:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.reason is None:
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self.samples.append(self.sample())
            except Exception as error:  # noqa: BLE001 - a GPU that does not report something must not end the run
                self.reason = f"NVML stopped answering: {error}"
                return
            if self._stop.wait(INTERVAL_S):
                return

    def summary(self) -> dict[str, Any]:
        """Medians, the highest temperature and memory, and every throttle reason seen; {} without samples."""
        if not self.samples:
            return {}
        columns = {name: [s[name] for s in self.samples] for name in self.samples[0]}
        bits = 0
        for value in columns.pop("throttle"):
            bits |= int(value)
        reasons = [text for bit, text in THROTTLE_REASONS.items() if bits & bit]
        highest = ("temperature_c", "memory_used_mb")
        values = {n: max(v) if n in highest else statistics.median(v) for n, v in columns.items()}
        return values | {"throttle_reasons": ", ".join(reasons) or "none"}

    def energy_mj(
        self, run: Callable[[], object], synchronize: Callable[[], None], seconds: float = 0.3
    ) -> float | None:
        """Millijoules per call, from the GPU's energy counter over ``seconds`` of calls; None without a counter."""
        if self.reason is not None:
            return None
        try:
            synchronize()
            before, calls, start = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle), 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                run()
                synchronize()
                calls += 1
            return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - before) / calls
        except self._nvml.NVMLError:  # older GPUs have no counter
            return None
