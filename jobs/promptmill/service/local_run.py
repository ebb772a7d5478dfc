"""``run``: jobs in the process of a command, with no queue. Their device, their locks, and how they end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from promptmill.core.settings import Settings
from promptmill.errors import DatabaseError, JobError, JobExists, ModelError, PromptmillError
from promptmill.ledger import Ledger, Progress
from promptmill.service.job_options import JobOptions
from promptmill.service.preflight import Preflight
from promptmill.service.prepare import canonical_name, model_name, prepare
from promptmill.service.submission import submit
from promptmill.store import catalog
from promptmill.types import JobState

if TYPE_CHECKING:
    from promptmill_workers.devices import Device

#: Called while a job runs.
OnProgress = Callable[[Progress], None]

#: Called once, before any device is used.
OnPreflight = Callable[[Preflight | None], None]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a command that ran a job ended."""

    job_id: str
    state: JobState
    #: False when Ctrl-C stopped it before its end.
    finished: bool = True
    #: It was to be opened, and was open.
    was_open: bool = False


def ledger_of(db: Engine, settings: Settings) -> Ledger:
    return Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts)


def one_device(asked: str, model: str) -> Device:
    """The device of an embedded job. Raises DeviceError."""
    from promptmill_workers.checkpoints import engine_of
    from promptmill_workers.devices import parse_devices, require_offload, usable

    engine = engine_of(canonical_name(model))
    if asked == "auto":
        return usable(parse_devices("auto")[:1], engine)[0]
    device = parse_devices(asked)[0]
    require_offload(device, engine)
    return device


def run(
    options: JobOptions,
    settings: Settings,
    db: Engine,
    on_progress: OnProgress = lambda progress: None,
    on_preflight: OnPreflight = lambda findings: None,
    on_stored: Callable[[str], None] = lambda job_id: None,
    on_loaded: Callable[[str], None] = lambda text: None,
) -> RunOutcome:
    """Store the job and run it in this process; returns when it has ended or was interrupted.

    ``on_loaded`` is told in a sentence which engine was chosen, why, and what it set up.
    """
    device = one_device(options.device, model_name(options.model, settings))
    here = LocalRun(settings, db, device, on_progress, options.context_tokens, on_loaded)
    # The device first: a job that cannot run now is not stored either.
    with holding(device):
        with prepare(options, settings, "embedded") as prepared:
            try:
                job_id = submit(db, prepared)
            except JobExists as twin:
                if options.if_exists != "attach":
                    raise
                return here.attach(twin.job_id)

        def started() -> None:
            on_stored(job_id)
            on_preflight(prepared.gauge.findings() if prepared.gauge else None)

        with owning(job_id):
            return here.run(job_id, started)


@dataclass(frozen=True, slots=True)
class LocalRun:
    """Runs stored jobs on a device of this machine, in this process. The caller holds the device."""

    settings: Settings
    db: Engine
    device: Device
    on_progress: OnProgress
    context_tokens: int | None = None
    on_loaded: Callable[[str], None] = lambda text: None

    def run(self, job_id: str, started: Callable[[], None] = lambda: None) -> RunOutcome:
        """However this ends before the job does, the job is paused and the person told how to go on.

        The caller owns the job. ``started`` is called first.
        """
        ledger = ledger_of(self.db, self.settings)
        try:
            started()
            return self._run(job_id, ledger)
        except KeyboardInterrupt:
            return RunOutcome(job_id, JobState.PAUSED, finished=False)
        except PromptmillError as problem:
            # Where the database itself is the trouble nothing can be paused, and resume works from 'running' too.
            paused = None
            with contextlib.suppress(SQLAlchemyError, DatabaseError):
                paused = ledger.pause(job_id)
            if paused is not False:
                state = "The job is paused" if paused else "What was done is kept"
                problem.hint = f"{state}; go on with: promptmill resume {job_id}. {problem.hint or ''}".rstrip()
            raise
        finally:
            with contextlib.suppress(SQLAlchemyError, DatabaseError):
                ledger.pause(job_id)

    def _run(self, job_id: str, ledger: Ledger) -> RunOutcome:
        from promptmill_workers.checkpoints import locate
        from promptmill_workers.host.client import HostConfig
        from promptmill_workers.worker.local_worker import EmbeddedWorker

        job, settings = catalog.find_job(self.db, job_id), self.settings
        if JobState(job.state).is_final:
            return RunOutcome(job_id, JobState(job.state))
        config = HostConfig.of(
            settings, job.model, self.device, slots=job.slots or settings.slots,
            context_tokens=self.context_tokens or settings.context_tokens,
        )  # fmt: skip
        with EmbeddedWorker(ledger, config, settings.grace_s) as worker:
            try:
                info = worker.load(job.context_tokens)
                require_same_model(job, info.fingerprint)
                self.on_loaded(
                    f"{info.engine} {info.version} ({locate(job.model).why}) on {info.device_got}: {info.slots} slots, "
                    f"context {info.context_tokens:,}, {info.kv_cells:,} KV cells"
                )
            except PromptmillError as problem:
                ledger.stop(job_id, problem.message)
                raise
            finished = worker.run(job_id, self.on_progress)
        return RunOutcome(job_id, ledger.progress(job_id).state, finished)

    def attach(self, job_id: str) -> RunOutcome:
        """Attach to an identical job: its outcome if it has ended, else run its remaining rows."""
        job = catalog.find_job(self.db, job_id)
        if JobState(job.state).is_final:
            return RunOutcome(job_id, JobState(job.state))
        if job.mode == "queue":
            raise JobError(f"job {job_id} asks the same and is {job.state} in the queue", hint="Use: promptmill watch")
        return self.go_on(job_id)

    def go_on(self, job_id: str) -> RunOutcome:
        """Run what is left of a job that was interrupted."""
        ledger = ledger_of(self.db, self.settings)
        with owning(job_id):
            require_unheld(job_id, ledger)
            ledger.resume(job_id)
            ledger.abandon_leases(job_id)
            return self.run(job_id)


def require_same_model(job: Row[Any], found: str | None) -> None:
    """Raise ModelError where another model lies under the name of the job's by now."""
    if job.model_fingerprint not in (None, found):
        raise ModelError(
            f"job {job.id} is for the model {job.model} with the fingerprint {job.model_fingerprint[:12]}, and the "
            f"files there are another model: {(found or 'none')[:12]}",
            hint="Put the job's own files back, or submit its dataset anew.",
        )


@contextlib.contextmanager
def holding(device: Device) -> Iterator[None]:
    """Keep workers off a GPU that is in use. CPUs may be shared: the operating system divides them."""
    from promptmill_workers.devices import DeviceLock

    if device.engine_device == "cpu":
        yield
        return
    lock = DeviceLock(device)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_unheld(job_id: str, ledger: Ledger) -> None:
    """Raise JobError for an embedded job that another machine, or a process with locks of its own, is running."""
    from promptmill_workers.devices import worker_lock

    for holder in ledger.holders(job_id):
        if not worker_lock(holder.worker_id).is_left():
            # Its row may not be there any more, or not yet.
            who = "another process" if holder.host is None else f"process {holder.pid} on {holder.host}"
            raise JobError(
                f"job {job_id} is being run by {who}",
                hint=f"Wait for it, or stop it first. If it is dead, its lease ends in {holder.seconds_left:.0f} s.",
            )


@contextlib.contextmanager
def owning(job_id: str) -> Iterator[None]:
    """Keep a second process from running the same embedded job. The kernel frees the lock of a dead one."""
    from promptmill_workers.devices import FileLock

    lock = FileLock(f"job-{job_id}")
    owner = lock.acquire()
    if owner is not None:
        raise JobError(f"job {job_id} is being run by process {owner}", hint="Wait for it, or stop it first.")
    try:
        yield
    finally:
        lock.release()
