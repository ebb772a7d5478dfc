"""What a worker measures of its device: by NVML where it is, and nothing made up where it is not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from promptmill_workers.devices import Device, DeviceMetrics


class NVMLError(Exception):
    """As the driver's library has it."""


def nvml(processes: list[SimpleNamespace], asked: list[object]) -> SimpleNamespace:
    """The calls of NVML that are used, answering as the library does."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: asked.append(index) or "handle",  # type: ignore[func-returns-value]
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or "handle",  # type: ignore[func-returns-value]
        nvmlDeviceGetComputeRunningProcesses=lambda handle: processes,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5000),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40),
    )


def test_a_gpu_is_read_by_its_number_and_the_process_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    own = SimpleNamespace(pid=7, usedGpuMemory=1234)
    monkeypatch.setitem(sys.modules, "pynvml", nvml([SimpleNamespace(pid=6, usedGpuMemory=99), own], asked))
    gauge = DeviceMetrics(Device("cuda:1"))
    assert (asked, gauge.memory_bytes(7), gauge.use_ratio()) == ([1], 1234, 0.4)
    # In a container the driver tells no processes apart: what is held in all is told.
    assert gauge.memory_bytes(8) == 5000


def test_a_driver_that_fails_measures_nothing_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = nvml([], [])

    def fail() -> None:
        raise NVMLError("driver not loaded")

    broken.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    gauge = DeviceMetrics(Device("cuda:0"))
    assert (gauge.memory_bytes(7), gauge.use_ratio()) == (None, None)


@pytest.mark.parametrize("name", ["cpu", "metal", "sim:2", "cuda:0"])
def test_without_a_driver_nothing_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gauge = DeviceMetrics(Device(name))
    assert (gauge.memory_bytes(1), gauge.use_ratio()) == (None, None)
