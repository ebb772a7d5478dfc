"""One Celery worker, bound to one device: claims the chunks whose ids arrive and runs them, two at a time.

Started by ``supervisor.py`` with its configuration as one JSON line on stdin. No model and no device is
touched in this process; the engine host does that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.signals import worker_shutting_down
from ulid import ULID

from promptmill.core import programs
from promptmill.core.settings import Settings, load_settings
from promptmill.core.terminal import for_people
from promptmill.database.clock import DatabaseClock
from promptmill.database.revision import open_database
from promptmill.database.timeouts import end_silent_connections
from promptmill.errors import EXIT_BAD_INPUT, EXIT_FAILED, BrokerError, DatabaseError, PromptmillError, first_line
from promptmill.ledger import Ledger
from promptmill.queue.broker import TASK_NAME, Broker, make_app, queue_name
from promptmill.queue.dispatcher import Dispatcher
from promptmill.queue.housekeeping import ROUND_S, STEP_S, Housekeeping
from promptmill.types import ChunkId, Lease
from promptmill_workers.devices import Device
from promptmill_workers.host.client import HostConfig
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.worker import queue_gate
from promptmill_workers.worker.chunk_runner import CHUNKS_AT_ONCE, KEPT_JOBS, ChunkRunner
from promptmill_workers.worker.database_retry import PASSING, DatabaseRetry
from promptmill_workers.worker.heartbeat import Heartbeat
from promptmill_workers.worker.held_leases import HeldLeases
from promptmill_workers.worker.interactive import LiveLane
from promptmill_workers.worker.operator_orders import Control
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Looks for chunks that lost their worker or their message, in the time of a lease: a dead worker's requests run again
#: within 1.2 leases.
RECONCILES = 10


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What the supervisor tells a worker."""

    device: str
    cores: tuple[int, ...]
    models: tuple[str, ...]
    slots: int | None
    context_tokens: int | None
    #: Seconds that requests which run get to end, when the worker is told to stop.
    grace_s: float


class Worker:
    """The parts of one worker process, put together."""

    def __init__(self, config: WorkerConfig, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.id = f"{socket.gethostname()}/{config.device}/{str(ULID())[-8:]}"
        self.stop = Shutdown()
        device = Device(config.device, config.cores)
        queue_gate.install()
        self.app = make_app(settings.redis_url)
        self.broker = Broker(settings.redis_url, self.app)
        self.broker.ping()
        # A connection for all work, and one for signs of life: however long results wait for a lock, or for each other,
        # leases are renewed.
        self.ledger = _ledger(settings, DatabaseClock())
        # Signs of life read the database's clock when nothing else does.
        alive = _ledger(settings, self.ledger.database_clock)
        self._house = Housekeeping(self.ledger.db, settings.samples_days, scoring=False)
        self.dispatcher = Dispatcher(self.ledger, self.broker)
        host = HostConfig.of(
            settings,
            config.models[0],
            device,
            slots=config.slots,
            context_tokens=config.context_tokens,
        )
        self.hosts = ModelHosts(host, self._host_changed)
        self._heartbeat = Heartbeat(
            alive, self.id, device, self.hosts, self.stop, models=config.models, redis_url=settings.redis_url
        )
        self._ended = threading.Event()
        self._patiently = DatabaseRetry(self.stop)
        self._claims = HeldLeases(self.ledger, self.id, self._patiently)
        self._runner = ChunkRunner(
            self.ledger,
            self.hosts,
            self.stop,
            self._patiently,
            lambda model: self.dispatcher.is_served_elsewhere(model, self.id),
            alive,
        )
        #: Job -> its model and the model's fingerprint.
        self._models: OrderedDict[str, tuple[str, str | None]] = OrderedDict()
        self._lanes = [
            LiveLane(name, self.id, settings.redis_url, self.hosts, self.stop, self.ledger.database_clock)
            for name in config.models
        ]
        _register(self.app, self)

    def run(self) -> None:
        """Load the model, then consume until SIGTERM. Raises PromptmillError when the worker cannot start."""
        self._heartbeat.start()
        try:
            self.hosts.start()
            # A thread of its own: Redis and the database may each hang for a while, and no heartbeat is to wait for it.
            threading.Thread(target=self._reconcile_for_ever, daemon=True).start()
            threading.Thread(target=self._keep_house_for_ever, daemon=True).start()
            Control(self.id, self.config.models, self.settings.redis_url, self.hosts, self.stop).start()
            for lane in self._lanes:
                lane.start()
            worker_shutting_down.connect(self._shutting_down, weak=False)
            queues = ",".join(queue_name(model) for model in self.config.models)
            self.app.worker_main(
                [
                    "worker", "--pool", "threads", "--concurrency", str(CHUNKS_AT_ONCE), "--queues", queues,
                    "--hostname", self.id.replace("/", "."), "--without-gossip", "--without-mingle",
                    "--without-heartbeat", "--loglevel", self.settings.log_level,
                ]
            )  # fmt: skip
        finally:
            self._ended.set()
            for lane in self._lanes:
                # Those who wait for an answer get it within the grace period.
                lane.join(self.config.grace_s if self.stop.draining.is_set() else 0)
            self.hosts.close()
            self._heartbeat.stop()

    def run_chunk(self, chunk: ChunkId) -> None:
        """One message: run the chunk unless another worker has it, then let the next one follow."""
        if self.stop.draining.is_set():
            # The message is read and gone: another worker is to get a new one soon.
            self.ledger.unpublish_chunk(chunk)
            return
        with self._claims.taken(lambda: self._choose(chunk)) as lease:
            if lease is None:
                return
            self._run(lease)
        try:
            self.dispatcher.dispatch(lease.chunk.job_id, lease.model, lease.priority, lease.model_fingerprint)
        except (BrokerError, *PASSING) as problem:
            # The chunk is done all the same; the reconciler publishes the next one when Redis is back.
            log.warning("no further chunk was published: %s", first_line(problem))

    def _choose(self, chunk: ChunkId) -> Lease | None:
        """Lease the chunk; or, while another model is loaded and it is not this one's turn, a chunk of that model."""
        model, fingerprint = self._model_of(chunk.job_id)
        if self._runner.refuses(chunk.job_id, model, fingerprint):
            # Its message is read and gone: it is published again, for a worker that has the right model.
            self.ledger.unpublish_chunk(chunk)
            return None
        if len(self.config.models) > 1 and not self.hosts.turn_of(model):
            loaded = self.hosts.model
            lease = self.ledger.claim_of_model(loaded, self.id, self.hosts.fingerprint_of(loaded))
            if lease is not None:
                # Its message is read and gone: it is published again when its job is looked after.
                self.ledger.unpublish_chunk(chunk)
                return lease
        return self.ledger.claim(chunk, self.id)

    def _model_of(self, job_id: str) -> tuple[str, str | None]:
        """The job's model and its fingerprint. Neither changes once both are known: asked once then."""
        known = self._models.get(job_id)
        if known is None:
            known = self.ledger.model_of(job_id) or (self.hosts.model, None)
            if known[1] is not None:
                self._models[job_id] = known
                while len(self._models) > KEPT_JOBS:
                    self._models.popitem(last=False)
        return known

    def _run(self, lease: Lease) -> None:
        log.info("chunk %s/%d: attempt %d, %d rows", lease.chunk.job_id, lease.chunk.number, lease.attempt, lease.rows)
        try:
            self._runner.run(lease)
        except PASSING as problem:
            # The database went away: let another attempt begin now and not when the lease ends.
            log.warning("chunk %s/%d is given back: %s", lease.chunk.job_id, lease.chunk.number, first_line(problem))
            with contextlib.suppress(*PASSING):
                self.ledger.release(lease)
        except Exception as problem:
            # Not even its failure could be counted: that is done when its lease has run out, and not for ever at once.
            log.error(
                "chunk %s/%d is left to its lease: %s: %s",
                lease.chunk.job_id, lease.chunk.number, type(problem).__name__, first_line(problem),
            )  # fmt: skip

    def _reconcile_for_ever(self) -> None:
        interval_s = self.ledger.lease_s / RECONCILES
        while not self.stop.draining.is_set():
            # Not all workers at the same moment.
            if self._ended.wait(interval_s * random.uniform(0.75, 1.25)):  # noqa: S311 - no secret
                return
            try:
                self.dispatcher.reconcile()
            except (BrokerError, *PASSING) as problem:
                log.warning("nothing was reconciled, trying again in %g s: %s", interval_s, first_line(problem))
            except Exception:
                log.exception("reconciling failed, trying again in %g s", interval_s)

    def _keep_house_for_ever(self) -> None:
        """In a thread of its own: what dead workers held is looked for meanwhile."""
        wait_s = ROUND_S
        # Not all workers at the same moment.
        while not self._ended.wait(wait_s * random.uniform(0.75, 1.25)):  # noqa: S311 - no secret
            wait_s = ROUND_S
            try:
                if self._house.step():
                    wait_s = STEP_S
            except PASSING as problem:
                log.warning("old rows stay for now: %s", first_line(problem))
            except Exception:
                log.exception("old rows could not be removed")

    def _host_changed(self, hosts: ModelHosts) -> None:
        self._heartbeat.changed(hosts)

    def _shutting_down(self, **_: Any) -> None:
        """SIGTERM: what runs may end within the grace period, the rest is given back."""
        self.stop.draining.set()
        timer = threading.Timer(self.config.grace_s, self._abandon)
        timer.daemon = True
        timer.start()

    def _abandon(self) -> None:
        self.stop.abandoning.set()
        self.hosts.stop_loading()


def _ledger(settings: Settings, clock: DatabaseClock) -> Ledger:
    """Over one connection."""
    db = open_database(settings.database_url, connections=1, idle_s=settings.lease_s / 2)
    # By then others have the chunks of a worker that hears nothing.
    end_silent_connections(db, 2 * settings.lease_s)
    return Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts, database_clock=clock)


def _register(app: Celery, worker: Worker) -> None:
    @app.task(name=TASK_NAME, acks_late=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def run_chunk(job_id: str, number: int) -> None:
        worker.run_chunk(ChunkId(job_id, number))


def main() -> None:
    """Entry point of the worker process."""
    order = programs.read_order()
    config = WorkerConfig(order["device"], tuple(order["cores"]), tuple(order["models"]), order["slots"],
                          order["context_tokens"], order["grace_s"])  # fmt: skip
    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level,
        format=f"%(asctime)s %(levelname)s [{config.device}] %(name)s: %(message)s",
        stream=for_people(sys.stderr),
    )
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
    # The supervisor is gone: stop as if it had said so.
    programs.when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        Worker(config, settings).run()
    except PromptmillError as problem:
        log.error("%s", problem)
        # A service that is away comes back: the supervisor tries again. A model that is not here does not.
        sys.exit(EXIT_FAILED if isinstance(problem, BrokerError | DatabaseError) else EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
