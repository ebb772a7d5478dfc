"""The supervisor of a machine: one worker process per device, started again when it dies, drained on SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from promptmill.core import programs
from promptmill.core.backoff import Backoff
from promptmill.errors import EXIT_BAD_INPUT
from promptmill_workers.devices import Device, DeviceLock

log = logging.getLogger("promptmill.pool")

#: Before a worker that died is started again.
RESTART = Backoff(1.0, 60.0)

#: A worker that lived so many seconds starts its back-off afresh.
STEADY_S = 60.0

#: Seconds between looks at the children.
POLL_S = 0.2

#: Seconds beyond the grace period that children get to say goodbye.
GOODBYE_S = 10.0


@dataclass(slots=True)
class WorkerProcess:
    """One device and the worker process that has it."""

    device: Device
    lock: DeviceLock
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    deaths: int = 0
    given_up: bool = field(default=False)


class Supervisor:
    """Starts and watches the workers of this machine. ``run`` returns the exit code of the command."""

    def __init__(
        self,
        devices: Sequence[Device],
        models: Sequence[str],
        slots: int | None,
        context_tokens: int | None,
        grace_s: float,
    ) -> None:
        self._locks = [DeviceLock(device) for device in devices]
        self._children = [WorkerProcess(device, lock) for device, lock in zip(devices, self._locks, strict=True)]
        self._models = list(models)
        self._slots = slots
        self._context_tokens = context_tokens
        self._grace_s = grace_s
        # Signals that asked us to stop. A plain number: a handler that takes a lock of the thread it interrupts, such
        # as that of an Event, waits for ever.
        self._signals = 0

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until no worker can be started.

        Raises DeviceError when another worker has one of the devices.
        """
        for lock in self._locks:
            lock.acquire(orphans_s=self._grace_s + GOODBYE_S)
        try:
            self._listen()
            while not self._signals:
                for child in self._children:
                    self._look_after(child)
                if all(child.given_up for child in self._children):
                    return EXIT_BAD_INPUT
                time.sleep(POLL_S)
            self._drain()
        finally:
            self._end_all()
            for lock in self._locks:
                lock.release()
        return 0

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once."""
        self._signals += 1

    def _look_after(self, child: WorkerProcess) -> None:
        if child.given_up:
            return
        if child.process is None:
            if time.monotonic() >= child.start_at:
                self._start(child)
        elif (code := child.process.poll()) is not None:
            self._bury(child, code)

    def _start(self, child: WorkerProcess) -> None:
        order = {
            "device": child.device.name,
            "cores": list(child.device.cores),
            "models": self._models,
            "slots": self._slots,
            "context_tokens": self._context_tokens,
            "grace_s": self._grace_s,
        }
        # A session of its own: Ctrl-C in the terminal must reach this process only.
        # It outlives a supervisor that is killed, and has the device until its own end: it inherits the lock.
        child.process = programs.start(
            "promptmill_workers.worker.celery_worker", order, env=child.device.environment(os.environ),
            start_new_session=True, pass_fds=[child.lock.fileno()],
        )  # fmt: skip
        child.started_at = time.monotonic()
        log.info("worker for %s started (process %d)", child.device.name, child.process.pid)

    def _bury(self, child: WorkerProcess, code: int) -> None:
        """Decide when the device gets a new worker. One that cannot work at all gets none."""
        child.process = None
        if code == EXIT_BAD_INPUT:
            child.given_up = True
            return
        lived = time.monotonic() - child.started_at
        child.deaths = 1 if lived > STEADY_S else child.deaths + 1
        delay = RESTART.delay_s(child.deaths)
        child.start_at = time.monotonic() + delay
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.warning("worker for %s ended (%s); next start in %.0f s", child.device.name, how, delay)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [child.process for child in self._children if child.process and child.process.poll() is None]

    def _drain(self) -> None:
        for process in self._running():
            process.terminate()
        log.info("stopping: requests that run get %.0f s to end; a second signal ends them now", self._grace_s)
        deadline = time.monotonic() + self._grace_s + GOODBYE_S
        while self._running() and time.monotonic() < deadline and self._signals < 2:
            time.sleep(POLL_S)

    def _end_all(self) -> None:
        for process in self._running():
            process.kill()
        for child in self._children:
            if child.process is not None:
                child.process.wait()
