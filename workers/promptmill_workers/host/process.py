"""The engine host: the child process that owns the device and the model. Started by ``client.py``.

Its parent hands it a listening Unix socket and, as one JSON line on stdin, what to load. Each connection is a session:
the requests of one chunk. When stdin ends, the parent is gone and so is the host.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from typing import Any

from promptmill.core import programs
from promptmill.core.terminal import for_people
from promptmill.types import EngineCounters, Failed, Ok, Result, Timing
from promptmill_workers.engines.contract import (
    Engine,
    EngineOptions,
    Finished,
    Rejected,
    RequestKey,
    TokenEvent,
)
from promptmill_workers.host.deduplication import Deduplication
from promptmill_workers.host.fan_out import FanOut
from promptmill_workers.host.preemption import Preemption
from promptmill_workers.host.wire import LiveText, Packed, pack_result, request_of
from promptmill_workers.model_files import LoadedFiles

log = logging.getLogger("promptmill.host")

#: Seconds between two messages of results to one session: five transactions a second and chunk are plenty.
FLUSH_S = 0.2

#: Results that are sent without waiting for FLUSH_S.
FLUSH_RESULTS = 256

#: Seconds between signs of life to a session whose requests run.
BEAT_S = 1.0


@dataclass(slots=True, eq=False)
class HostSession:
    """One connection: its running requests and the results not yet sent."""

    connection: Connection
    #: A client waits for its answers: they are sent with every step, and its requests are urgent.
    live: bool = False
    keys: dict[int, RequestKey] = field(default_factory=dict)
    results: list[Packed] = field(default_factory=list)
    #: Text for those who wait for it, sent with every step.
    texts: list[LiveText] = field(default_factory=list)
    outbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    flushed_at: float = 0.0
    beat_at: float = 0.0
    #: It has asked for its last counters: what the engine does from then on is not its work.
    is_counted: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an engine key came from."""

    session: HostSession
    row: int
    received_at: float


class HostLoop:
    """Feeds the engine from the sessions and the sessions from the engine. One thread owns the engine."""

    def __init__(self, engine: Engine, files: LoadedFiles | None = None) -> None:
        self._engine = engine
        self._info = replace(engine.info, files=files)
        self._inbox: queue.SimpleQueue[tuple[HostSession, Any]] = queue.SimpleQueue()
        self._sessions: set[HostSession] = set()
        self._origins: dict[RequestKey, Origin] = {}
        self._next_key = 0
        self._reported = EngineCounters()
        # Requests of the API since counters were last told, and whether any of their work is not set aside yet.
        self._live_seen = 0
        self._live_pending = False

    def serve(self, listener: socket.socket) -> None:
        """Run for ever. A failure of the engine ends the process: another one takes over."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        while True:
            self._take_messages()
            for event in self._engine.step():
                if isinstance(event, TokenEvent):
                    self._tell(event)
                else:
                    self._route(event)
            self._send()
            self._set_live_aside()

    # --- threads that only move messages -----------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                accepted, _ = listener.accept()
                session = HostSession(Connection(accepted.detach()))
                threading.Thread(target=self._read, args=(session,), daemon=True).start()
                threading.Thread(target=_write, args=(session,), daemon=True).start()
        except Exception:
            # No memory for a thread, say. A host that takes no sessions is of no use: another one takes over.
            log.exception("the host takes no more sessions and ends")
            os._exit(1)

    def _read(self, session: HostSession) -> None:
        try:
            while True:
                self._inbox.put((session, session.connection.recv()))
        except (EOFError, OSError):
            self._inbox.put((session, ("gone",)))

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        """All that has arrived; waits for something when the engine has nothing to do."""
        if not self._origins:
            self._handle(*self._inbox.get())
        while True:
            try:
                session, message = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._handle(session, message)

    def _handle(self, session: HostSession, message: Any) -> None:
        match message:
            case ("hello",):
                self._leave_idle_out()
                self._sessions.add(session)
                session.outbox.put(("ready", self._info))
            case ("live",):
                session.live = True
            case ("cancel", rows):
                self._drop(session, [session.keys[row] for row in rows if row in session.keys])
            case ("add", requests):
                self._add(session, requests)
            case ("drain",):
                self._drop(session, self._engine.waiting_keys())
            case ("abandon",):
                self._drop(session, list(session.keys.values()))
            case ("counters",):
                if not self._origins:
                    self._engine.step()  # An empty step: what was idle is counted up to now.
                session.outbox.put(("counters", self._new_counters()))
                session.is_counted = True
            case ("gone",):
                self._drop(session, list(session.keys.values()))
                self._sessions.discard(session)
                session.outbox.put(None)

    @property
    def _works_for_jobs(self) -> bool:
        return any(not (each.live or each.is_counted) for each in self._sessions)

    def _leave_idle_out(self) -> None:
        """What the engine idled while no session worked for a job is no job's time."""
        if not self._works_for_jobs:
            if not self._origins:
                self._engine.step()  # An empty step: what was idle is counted up to now.
            self._reported = replace(self._reported, idle_s=self._engine.counters.idle_s)

    def _set_live_aside(self) -> None:
        """While only requests of the API run, what the engine does is no job's: it is counted as told, step by step."""
        if not self._live_pending or self._works_for_jobs:
            return
        self._reported = self._engine.counters
        self._live_seen = sum(len(each.keys) for each in self._sessions)
        # What is cancelled before the next step is still to be set aside after it.
        self._live_pending = self._live_seen > 0

    def _add(self, session: HostSession, requests: Sequence[Packed]) -> None:
        received_at = time.monotonic()
        batch = []
        for packed in requests:
            row, key = packed[0], self._next_key
            self._next_key += 1
            session.keys[row] = key
            self._origins[key] = Origin(session, row, received_at)
            batch.append(request_of(packed, key, urgent=session.live))
        if session.live:
            self._live_seen += len(batch)
            self._live_pending = True
        session.flushed_at = received_at
        # The first sign of life soon: a chunk may be over within a second.
        session.beat_at = received_at - BEAT_S + FLUSH_S
        self._engine.add(batch)

    def _drop(self, session: HostSession, keys: Any) -> None:
        """Cancel those of the session's requests that are among ``keys`` and say which rows they were."""
        wanted = set(keys)
        rows = [row for row, key in session.keys.items() if key in wanted]
        for row in rows:
            key = session.keys.pop(row)
            self._origins.pop(key, None)
            self._engine.cancel(key)
        session.outbox.put(("dropped", len(rows)))

    def _tell(self, event: TokenEvent) -> None:
        origin = self._origins.get(event.key)
        if origin is not None:
            origin.session.texts.append(LiveText(origin.row, event.text, event.logprobs, event.index))

    def _route(self, event: Finished | Rejected) -> None:
        origin = self._origins.pop(event.key, None)
        if origin is not None:
            del origin.session.keys[origin.row]
            origin.session.results.append(pack_result(_result(event, origin)))

    def _send(self) -> None:
        now = time.monotonic()
        for session in self._sessions:
            if session.texts:
                session.outbox.put(("texts", session.texts))
                session.texts = []
            due = (
                session.live
                or not session.keys
                or len(session.results) >= FLUSH_RESULTS
                or now - session.flushed_at >= FLUSH_S
            )
            if session.results and due:
                # A live session is told no counters: they are for jobs.
                counters = EngineCounters() if session.live else self._new_counters()
                session.outbox.put(("results", session.results, counters))
                session.results = []
                session.flushed_at = now
            if session.keys and now - session.beat_at >= BEAT_S:
                engine = self._engine
                session.outbox.put(("beat", engine.active, engine.waiting, engine.kv_cells_used))
                session.beat_at = now

    def _new_counters(self) -> EngineCounters:
        """What the engine did since it was last asked; peaks are of its whole life."""
        now, before = self._engine.counters, self._reported
        self._reported = now
        summed = [each.name for each in fields(EngineCounters) if not each.name.startswith("peak_")]
        live, self._live_seen = self._live_seen, sum(len(each.keys) for each in self._sessions if each.live)
        told = replace(now, **{name: getattr(now, name) - getattr(before, name) for name in summed})
        return replace(told, live_requests=max(live, self._live_seen))


def _result(event: Finished | Rejected, origin: Origin) -> Result:
    timing: Timing | None = None
    extras = event.extras if isinstance(event, Finished) else None
    copied = extras is not None and extras.deduplicated
    if not copied and event.admitted_at is not None and event.finished_at is not None:
        first = event.first_token_at if event.first_token_at is not None else event.finished_at
        timing = Timing(origin.received_at, event.admitted_at, first, event.finished_at)
    if isinstance(event, Finished):
        return Ok(origin.row, event.text, event.finish_reason, event.usage, timing, extras)
    return Failed(origin.row, event.error_class, event.message, event.usage, timing)


def _write(session: HostSession) -> None:
    """Send what the engine's thread put into the outbox: a slow reader must not hold the engine up."""
    while (message := session.outbox.get()) is not None:
        try:
            session.connection.send(message)
        except OSError:
            return


def main() -> None:
    """Entry point of the child process: load, then serve."""
    # Ctrl-C in a terminal reaches the whole process group; the parent decides when the host ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = programs.read_order()
    logging.basicConfig(
        level=config["log_level"], format="%(levelname)s %(name)s: %(message)s", stream=for_people(sys.stderr)
    )
    programs.when_parent_ends(lambda: os._exit(0))
    if config["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config["cores"])
    listener = socket.socket(fileno=config["socket"])
    engine, files = _load(config, listener)
    HostLoop(engine, files).serve(listener)


def wrapped(engine: Engine, *, deduplicate: bool = True) -> Engine:
    """The engine for requests in parts, some of them urgent, and some of them identical."""
    whole = FanOut(Preemption(engine))
    return Deduplication(whole) if deduplicate else whole


def _load(config: dict[str, Any], listener: socket.socket) -> tuple[Engine, LoadedFiles | None]:
    """The engine and its files.

    A model that cannot be loaded is reported to the first that connects, and ends the process.
    """
    from promptmill.errors import PromptmillError
    from promptmill_workers.checkpoints import load_engine

    try:
        engine, files = load_engine(config["model"], EngineOptions(**config["options"]))
        return wrapped(engine, deduplicate=config["deduplicate"]), files
    except (PromptmillError, MemoryError) as problem:
        accepted, _ = listener.accept()
        connection = Connection(accepted.detach())
        connection.send(("failed", type(problem).__name__, getattr(problem, "message", "out of memory"),
                         getattr(problem, "hint", None)))  # fmt: skip
        connection.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
