"""The worker's loop without Celery, for ``promptmill run``: one device, in this process and its engine host."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType

from ulid import ULID

from promptmill.errors import DatabaseError, first_line
from promptmill.ledger import Ledger, Progress
from promptmill.types import Lease
from promptmill_workers.devices import worker_lock
from promptmill_workers.engines.contract import EngineInfo
from promptmill_workers.host.client import HostConfig
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker.chunk_runner import CHUNKS_AT_ONCE, ChunkRunner
from promptmill_workers.worker.database_retry import PASSING, DatabaseRetry, GaveUp, gave_up
from promptmill_workers.worker.heartbeat import Heartbeat
from promptmill_workers.worker.held_leases import HeldLeases
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Seconds between two looks at the job's progress: at first, at most, and the share of the time since that is added.
TICK_S = 0.1
SLOWEST_TICK_S = 1.0
TICK_SHARE = 0.02

#: Seconds that results wait for a database that takes none, before the person is told and the job paused.
DATABASE_S = 60.0

#: Seconds between looks for leases and jobs whose time ran out.
RECONCILE_S = 1.0

#: Longest wait of a thread for a chunk that may not be run yet.
IDLE_S = 0.1


class EmbeddedWorker:
    """One worker in this process."""

    def __init__(self, ledger: Ledger, config: HostConfig, grace_s: float) -> None:
        self._ledger = ledger
        self._grace_s = grace_s
        self._id = f"{socket.gethostname()}/{config.device.name}/{str(ULID())[-8:]}"
        self._stop = Shutdown()
        self._signals = 0
        self._reconciled_at = time.monotonic()
        #: Since when the database has answered none of the looks at the job.
        self._unseen_since: float | None = None
        self._interrupted_at: float | None = None
        self._hosts = ModelHosts(config)
        self._lock = worker_lock(self._id)
        self._lock.acquire()
        self._patiently = DatabaseRetry(self._stop, limit_s=DATABASE_S)
        self._claims = HeldLeases(ledger, self._id, self._patiently)
        self._runner = ChunkRunner(ledger, self._hosts, self._stop, self._patiently)
        self._heartbeat = Heartbeat(ledger, self._id, config.device, self._hosts, self._stop)
        self._threads = ThreadPoolExecutor(CHUNKS_AT_ONCE, thread_name_prefix="chunk")

    def __enter__(self) -> EmbeddedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.abandoning.set()
        self._hosts.close()
        self._threads.shutdown(wait=True)
        self._lock.remove()

    def load(self, context_tokens: int | None) -> EngineInfo:
        """Load the model, with room for requests of ``context_tokens``; returns what was set up.

        Raises PromptmillError for a model that cannot be loaded.
        """
        return self._hosts.start(context_tokens)

    def run(self, job_id: str, on_progress: Callable[[Progress], None]) -> bool:
        """Run the job's chunks to the end; False when Ctrl-C or SIGTERM stopped it before.

        The first signal lets running requests end, the second one does not. Either way the job is left paused.
        Raises DatabaseError when the database took or answered nothing for a minute.
        """
        try:
            return self._run(job_id, on_progress)
        except DatabaseError:
            raise
        except PASSING as problem:
            # A run that drops everything does not wait for the database.
            raise DatabaseError(f"the database took no change: {first_line(problem)}") from problem

    def _run(self, job_id: str, on_progress: Callable[[Progress], None]) -> bool:
        self._patiently(lambda again: self._heartbeat.start())
        try:
            with self._interruptible():
                workers = [self._threads.submit(self._work, job_id) for _ in range(CHUNKS_AT_ONCE)]
                self._watch(job_id, workers, on_progress)
        finally:
            self._stop.draining.set()
            self._heartbeat.stop()
        for worker in workers:
            worker.result()
        progress = self._patiently(lambda again: self._ledger.progress(job_id))
        on_progress(progress)
        if not progress.state.is_final:
            self._patiently(lambda again: self._ledger.pause(job_id))
        return progress.state.is_final

    def _watch(self, job_id: str, workers: list[Future[None]], on_progress: Callable[[Progress], None]) -> None:
        began = time.monotonic()
        while not all(worker.done() for worker in workers):
            self._obey_signals()
            self._look(job_id, on_progress)
            if any(worker.done() and worker.exception() for worker in workers):
                self._stop.draining.set()
            # Looking takes time from an engine that uses all cores: a long job is looked at less often.
            wait(workers, timeout=min(SLOWEST_TICK_S, TICK_S + TICK_SHARE * (time.monotonic() - began)))

    def _look(self, job_id: str, on_progress: Callable[[Progress], None]) -> None:
        """Tell how far the job is. Without waiting in here for a database that is away: signals are to be obeyed."""
        began = time.monotonic()
        try:
            self._reconcile()
            progress = self._ledger.progress(job_id)
        except PASSING as problem:
            if self._unseen_since is None:
                self._unseen_since = began
                log.warning("the database does not answer, trying again: %s", first_line(problem))
            if time.monotonic() - self._unseen_since > DATABASE_S:
                raise gave_up(DATABASE_S, problem) from problem
        else:
            self._unseen_since = None
            on_progress(progress)

    def _reconcile(self) -> None:
        """What the reconcilers of workers do, for a job that has none."""
        if time.monotonic() - self._reconciled_at > RECONCILE_S:
            self._reconciled_at = time.monotonic()
            self._ledger.requeue_expired()
            self._ledger.complete_jobs()
            self._ledger.expire_overdue()

    def _work(self, job_id: str) -> None:
        """One of the threads: claim a chunk, run it, until none is left."""
        while not self._stop.draining.is_set():
            with self._claims.taken(lambda: self._ledger.claim_next(job_id, self._id)) as lease:
                if lease is not None:
                    self._run_chunk(lease)
            if lease is None and not self._wait_for_chunk(job_id):
                return

    def _run_chunk(self, lease: Lease) -> None:
        try:
            self._runner.run(lease)
        except GaveUp:
            raise
        except PASSING as problem:
            # The database went away where nothing waits for it: another attempt answers what is not stored.
            log.warning("chunk %s/%d is given back: %s", lease.chunk.job_id, lease.chunk.number, first_line(problem))
            self._patiently(lambda again: self._ledger.release(lease))

    def _wait_for_chunk(self, job_id: str) -> bool:
        """False when the job has ended. Otherwise a chunk of the other thread may come back: wait a little."""
        if not self._patiently(lambda again: self._ledger.is_open(job_id)):
            return False
        self._stop.draining.wait(IDLE_S)
        return True

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Turn signals into a drain, where this is the main thread; elsewhere the caller's own handling stays."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A handler that takes a lock of the thread it interrupts waits for ever: count, and act in the loop.
        self._signals += 1

    def _obey_signals(self) -> None:
        if self._signals and self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
            self._stop.draining.set()
        overdue = self._interrupted_at is not None and time.monotonic() - self._interrupted_at > self._grace_s
        if (self._signals > 1 or overdue) and not self._stop.abandoning.is_set():
            self._stop.abandoning.set()
            self._hosts.close()
