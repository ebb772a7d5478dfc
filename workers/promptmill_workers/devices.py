"""Devices: what is here, what was asked for, and an environment that shows an engine exactly one of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from promptmill.core.settings import load_settings
from promptmill.errors import DeviceError

log = logging.getLogger("promptmill.devices")

#: Rounds that an OpenMP thread waits awake; then it sleeps until it is woken. On an idle machine so many cost nothing
#: (decoding 0.6B: 153 tok/s of 16 sequences, 152 with the default of 300,000); 1,000 cost 5 %.
SPIN_COUNT = "5000"

#: Seconds between two tries to get the lock of a worker that is ending.
LOCK_LOOK_S = 0.2

#: Seconds that asking an engine's library what it can do may take: it loads CUDA's libraries.
PROBE_TIMEOUT_S = 120

HINT = "Use auto, cpu, cpu:0-3, cuda, cuda:0, metal, or sim:4 for four simulated devices."


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as one worker is pinned to it."""

    #: ``cpu``, ``cpu:0-3``, ``cuda:0``, ``metal``, ``sim:2``.
    name: str
    #: CPU cores the host may use; empty for all of them.
    cores: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def engine_device(self) -> str:
        """What the engine is asked for: a simulated device is a CPU."""
        if self.kind in ("cpu", "sim"):
            return "cpu"
        # The host's environment shows one GPU, and inside it that one has the number 0.
        return "cuda:0" if self.kind == "cuda" else self.name

    @property
    def threads(self) -> int | None:
        """Threads of a CPU engine; None leaves it to the engine."""
        return len(self.cores) or None

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` changed so that exactly this device is visible. It must be set before any library is imported."""
        visible = self.name.partition(":")[2] if self.kind == "cuda" else ""
        # GNU OpenMP's threads wait for each other in a loop of milliseconds. When another program holds a core, that is
        # time no core computes: on two cores small models ran twenty times slower. A user's own value stays.
        base = {"GOMP_SPINCOUNT": SPIN_COUNT, **base}
        pinned = {"PYTHONSAFEPATH": "1", "PROMPTMILL_DEVICE": self.name, "TOKENIZERS_PARALLELISM": "false"}
        if self.kind != "metal":
            pinned["CUDA_VISIBLE_DEVICES"] = visible
            # nvidia-smi numbers by bus; CUDA's own default puts the fastest first.
            pinned["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if self.cores:
            pinned["OMP_NUM_THREADS"] = str(len(self.cores))
        return {**base, **pinned}


def parse_devices(asked: str) -> list[Device]:
    """The devices that ``--device`` names; several are separated by commas.

    Raises :class:`DeviceError` for a word that names none, or a device that this machine does not have.
    """
    found = [device for word in asked.split(",") for device in _parse_one(word.strip())]
    names = [device.name for device in found]
    for name in names:
        if names.count(name) > 1:
            raise DeviceError(f"device {name} is named twice", hint="One worker owns a device.")
    return found


def _parse_one(word: str) -> list[Device]:
    kind, _, rest = word.partition(":")
    match kind:
        case "auto" if not rest:
            return _discover()
        case "cpu":
            return [Device(word, _cores(rest))]
        case "cuda":
            return _cuda(rest)
        case "metal" if not rest:
            if not _has_metal():
                raise DeviceError("this machine has no Metal", hint=HINT)
            return [Device("metal")]
        case "sim" if re.fullmatch(r"[1-9][0-9]{0,2}", rest):
            return [_simulated(number, int(rest)) for number in range(int(rest))]
    raise DeviceError(f"'{word}' is no device", hint=HINT)


def _discover() -> list[Device]:
    gpus = cuda_devices()
    if gpus:
        return [Device(f"cuda:{number}") for number in gpus]
    return [Device("metal")] if _has_metal() else [Device("cpu")]


def _has_metal() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def cuda_devices() -> list[int]:
    """Numbers of the NVIDIA GPUs that this process may use, by the driver's own tool; empty without one.

    A ``CUDA_VISIBLE_DEVICES`` that was set outside, by a scheduler, narrows them: numbers as nvidia-smi gives them, or
    (the start of) UUIDs.
    """
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^GPU (\d+):.*?(?:\(UUID: ([^)]*)\))?$", listing.stdout, flags=re.MULTILINE)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [int(number) for number, _ in found]
    allowed = [word.strip() for word in visible.split(",") if word.strip()]
    return [
        int(number)
        for number, uuid in found
        if number in allowed or any(uuid and not word.isdecimal() and uuid.startswith(word) for word in allowed)
    ]


def _cuda(rest: str) -> list[Device]:
    here = cuda_devices()
    if not here:
        raise DeviceError("no NVIDIA GPU is visible on this machine (nvidia-smi lists none)", hint=HINT)
    wanted = here if not rest else [int(rest)] if rest.isdecimal() else []
    if not wanted or not set(wanted) <= set(here):
        raise DeviceError(f"there is no device cuda:{rest}", hint=f"Here: {', '.join(f'cuda:{n}' for n in here)}.")
    return [Device(f"cuda:{number}") for number in wanted]


def _allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores(text: str) -> tuple[int, ...]:
    """``0-3`` or ``2`` as core numbers; nothing means all."""
    if not text:
        return ()
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    cores = tuple(range(first, last + 1))
    if not cores or not set(cores) <= set(_allowed_cores()):
        here = _allowed_cores()
        raise DeviceError(f"cpu:{text} names no cores of this machine", hint=f"It has cores {here[0]}-{here[-1]}.")
    return cores


def _simulated(number: int, of: int) -> Device:
    """Simulated devices share this machine's cores out among them."""
    here = _allowed_cores()
    share = here[number * len(here) // of : (number + 1) * len(here) // of] or [here[number % len(here)]]
    return Device(f"sim:{number}", tuple(share))


def usable(devices: Sequence[Device], engine: str) -> list[Device]:
    """What ``auto`` means for ``engine``: the devices found, or the CPU when the engine cannot use them."""
    try:
        for device in devices:
            require_offload(device, engine)
    except DeviceError as problem:
        log.warning("%s: using the CPU", problem.message)
        return [Device("cpu")]
    return list(devices)


def require_offload(device: Device, engine: str) -> None:
    """Refuse a GPU that the installed engine cannot use, instead of computing on the CPU without a word.

    Asks the engine's library in a process of its own: a worker's supervisor must not touch a device.
    """
    if device.engine_device == "cpu" or engine == "echo":
        return
    probe = {
        "llamacpp": "import llama_cpp; raise SystemExit(0 if llama_cpp.llama_supports_gpu_offload() else 9)",
        "mlx": "import mlx.core as mx; raise SystemExit(0 if mx.metal.is_available() else 9)",
    }[engine]
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe], capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
    )
    if done.returncode != 0 or (engine == "mlx" and device.kind == "cuda"):
        raise DeviceError(
            f"{device.name} was asked for, but the installed {engine} cannot use it",
            hint="Install the engine built for this device (README, 'GPUs'), or ask for --device cpu.",
        )


class FileLock:
    """A lock that lives as long as its process: the kernel frees it, however the process ends."""

    def __init__(self, name: str) -> None:
        self._path = _runtime_dir() / f"{name}.lock"
        self._file: IO[str] | None = None

    def acquire(self) -> str | None:
        """Take the lock; None on success, else the id of the process that has it.

        Raises :class:`DeviceError` for a file that cannot be one.
        """
        try:
            file = open(self._path, "a+", opener=_private)  # noqa: SIM115 - stays open: closing it would free the lock
        except OSError as problem:
            why = "it is a symbolic link" if problem.errno == errno.ELOOP else problem.strerror
            raise DeviceError(
                f"cannot use the lock {self._path}: {why}",
                hint="Remove it, or set JOBS_RUNTIME_DIR to a folder of your own.",
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            return owner
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return None

    def is_left(self) -> bool:
        """Whether a process had it here that is gone: what is left of it goes. False where none ever had it here."""
        if not self._path.exists() or self.acquire() is not None:
            return False
        self.remove()
        return True

    def remove(self) -> None:
        """Release it for good: no lock of this name is taken again."""
        self._path.unlink(missing_ok=True)
        self.release()

    def fileno(self) -> int:
        """The descriptor of a lock that is held: a child that inherits it holds the lock too, until both are gone."""
        assert self._file is not None
        return self._file.fileno()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def worker_lock(worker_id: str) -> FileLock:
    """Held by a worker in a command's process while it lives. A pid proves nothing: each container has its own."""
    return FileLock(f"worker-{worker_id.replace('/', '-')}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _runtime_dir() -> Path:
    """A folder of this user for locks. The same in every session: XDG_RUNTIME_DIR is not, cron and containers lack it.

    Raises :class:`DeviceError` when it belongs to another user, or is no folder.
    """
    asked = load_settings().runtime_dir
    folder = Path(asked or f"/tmp/promptmill-{os.getuid()}")  # noqa: S108 - owner checked
    hint = "Set JOBS_RUNTIME_DIR to a folder of your own."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as problem:
        raise DeviceError(f"cannot use the folder of locks {folder}: {problem.strerror}", hint=hint) from None
    if (not asked and folder.is_symlink()) or found.st_uid != os.getuid():
        raise DeviceError(f"{folder} belongs to another user", hint=hint)
    if not asked and found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class DeviceLock:
    """Keeps a second worker off a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = FileLock(f"device-{device.name.replace(':', '-')}")

    def acquire(self, orphans_s: float = 0.0) -> None:
        """Raises :class:`DeviceError` naming the process that has the device.

        ``orphans_s``: seconds to wait for a worker whose supervisor was killed, and which is ending.
        """
        deadline = time.monotonic() + orphans_s
        told = False
        while (owner := self._lock.acquire()) is not None:
            if time.monotonic() >= deadline or not owner.isdecimal() or _is_running(int(owner)):
                raise DeviceError(
                    f"device {self._device.name} already has a worker (process {owner})",
                    hint="One worker owns a device. Stop that one first, or choose another device.",
                )
            if not told:
                log.info("the worker that process %s left on %s is ending: waiting for it", owner, self._device.name)
            told = True
            time.sleep(LOCK_LOOK_S)

    def fileno(self) -> int:
        """See :meth:`FileLock.fileno`."""
        return self._lock.fileno()

    def release(self) -> None:
        self._lock.release()


class DeviceMetrics:
    """Memory and use of one device, as NVML tells them for NVIDIA GPUs. Everything else is None: it is not known."""

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
