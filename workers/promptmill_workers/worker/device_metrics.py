"""Memory and use of a device, as its own driver tells them: NVML for NVIDIA GPUs. Nothing is known of others."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from promptmill_workers.devices import Device

log = logging.getLogger("promptmill.devices")


class DeviceMetrics:
    """Reads one device. Everything is None where its driver, or nvidia-ml-py, is not here."""

    def __init__(self, device: Device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if device.kind == "cuda":
            self._open(device.name.partition(":")[2] or "0")

    def _open(self, index: str) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            # NVML numbers by bus, as the workers are pinned (CUDA_DEVICE_ORDER=PCI_BUS_ID); MIG devices have names.
            by_name = index.startswith(("GPU-", "MIG-"))
            find = pynvml.nvmlDeviceGetHandleByUUID if by_name else pynvml.nvmlDeviceGetHandleByIndex
            self._handle = find(index if by_name else int(index))
            self._nvml = pynvml
        except ImportError:
            log.info("no device memory is measured: nvidia-ml-py is not installed")
        except Exception as problem:
            # The error is of the driver's own kind, which is not known without it. A worker works without its gauge.
            log.warning("no device memory is measured: %s", problem)

    def memory_bytes(self, pid: int | None) -> int | None:
        """What the engine's process holds; what the device holds in all where the driver tells no processes apart."""
        if self._nvml is None:
            return None
        with contextlib.suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == pid and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        with contextlib.suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None

    def use_ratio(self) -> float | None:
        """Share of the driver's last sampling time in which the device computed anything."""
        if self._nvml is None:
            return None
        with contextlib.suppress(self._nvml.NVMLError):
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        return None
