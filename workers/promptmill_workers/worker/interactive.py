"""Requests with a waiting client: taken from Redis at once and run beside the chunks, their tokens sent back."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

from redis.exceptions import RedisError

from promptmill.core.redis_client import redis_client
from promptmill.database.clock import DatabaseClock
from promptmill.errors import PromptmillError
from promptmill.queue.broker import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from promptmill.queue.heartbeats import HEARTBEAT_S, Absences
from promptmill.queue.interactive_wire import (
    AGAIN,
    CANCEL,
    DONE,
    FAILED,
    REPEAT,
    SERVER_GONE_S,
    TAKEN,
    TEXT,
    LiveRequest,
    answer_of,
    lane_list,
    live_queue,
    server_key,
)
from promptmill.types import ErrorClass, Ok, Result
from promptmill_workers.host.client import HostDied, Session
from promptmill_workers.host.model_hosts import ModelHosts
from promptmill_workers.host.turns import FAIR_S
from promptmill_workers.host.wire import LiveText
from promptmill_workers.worker.replies import Replies
from promptmill_workers.worker.shutdown import Shutdown

log = logging.getLogger("promptmill.worker")

#: Seconds that a look into Redis waits for something.
LOOK_S = 1
#: The same while requests run: a cancelled one frees its slot within it.
SHORT_LOOK_S = 0.05

#: Seconds that a session without requests is kept open for the next one.
LINGER_S = 0.5

#: Seconds before Redis is tried again after it was away.
AWAY_S = 1.0

#: Orders of servers that are read at once.
ORDERS_AT_ONCE = 256

#: Requests taken per slot: enough that no slot waits for Redis, and no more, so that other workers get their share.
TAKEN_PER_SLOT = 2


class LiveLane:
    """One model's urgent requests on one worker. A thread of its own, and while requests run a second one."""

    def __init__(
        self, model: str, worker_id: str, redis_url: str, hosts: ModelHosts, stop: Shutdown, clock: DatabaseClock
    ) -> None:
        self._model = model
        self._worker_id = worker_id
        self._redis: Any = redis_client(
            redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
        )
        self._hosts = hosts
        self._stop = stop
        self._clock = clock
        self._queue, self._orders = live_queue(model), lane_list(worker_id, model)
        self._replies = Replies(self._redis, worker_id, stop)
        self._running: dict[int, LiveRequest] = {}
        self._row = 0
        #: What answers in the session that is open.
        self._backend = ""
        self._absences = Absences(SERVER_GONE_S)
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name=f"live-{model[-20:]}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until what runs has ended; the worker is draining."""
        self._thread.join(seconds)

    @property
    def _taking(self) -> bool:
        return not self._stop.draining.is_set() and self._hosts.kept_waiting_s(self._model) < FAIR_S

    def _run(self) -> None:
        while not self._stop.draining.is_set():
            try:
                found = self._redis.blpop(self._lists(), LOOK_S)
                if found is not None and found[0].decode() == self._queue:
                    self._hold(self._taken([found[1]]))
                elif found is not None:
                    self._obey(None, [found[1]])
                # What came while a session was closed gets another one.
                while self._running and not self._stop.abandoning.is_set():
                    self._serve()
            except RedisError as problem:
                log.warning("requests of the API wait for Redis: %s", str(problem).splitlines()[0])
                self._stop.draining.wait(AWAY_S)
            except Exception as problem:
                log.exception("the lane of urgent requests failed, and goes on")
                self._lost(ErrorClass.INTERNAL, f"internal error: {type(problem).__name__}")
                self._stop.draining.wait(AWAY_S)

    # --- one session -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Run requests until none is left. What a host that dies leaves unanswered is tried again."""
        with self._lock:
            rows = list(self._running)
        try:
            with self._hosts.session(self._model, urgent=True) as session:
                session.go_live()
                self._backend = session.info.backend
                self._send(session, rows)
                ended = threading.Event()
                reader = threading.Thread(target=self._read, args=(session, ended), daemon=True)
                reader.start()
                try:
                    self._pump(session)
                finally:
                    ended.set()
                    reader.join()
        except HostDied as death:
            self._lost(death.error_class, str(death))
        except PromptmillError as problem:
            log.error("urgent requests for %s: %s", self._model, problem.message)
            self._refuse(ErrorClass.MODEL_LOAD, problem.message)
        except OSError as problem:
            self._lost(ErrorClass.ENGINE_CRASH, f"the engine host is gone: {problem}")

    def _lists(self) -> list[str]:
        """What is read now. Orders always are: a server may have missed what was said."""
        return [self._orders, self._queue] if self._taking else [self._orders]

    def _hold(self, requests: list[LiveRequest]) -> list[int]:
        """Requests are this worker's now; returns their rows."""
        with self._more:
            rows = list(range(self._row + 1, self._row + 1 + len(requests)))
            self._running |= dict(zip(rows, requests, strict=True))
            self._row += len(requests)
            self._more.notify_all()
        return rows

    def _taken(self, found: Iterable[bytes]) -> list[LiveRequest]:
        """Requests whose client still waits; each server is told that they are taken."""
        requests = []
        for data in found:
            try:
                requests.append(LiveRequest.decode(data))
            except ValueError as problem:
                log.warning("a message of %d bytes in %s is dropped: %s", len(data), self._queue, problem)
        gone = self._gone({each.server for each in requests})
        wanted = [each for each in requests if each.server not in gone]
        self._replies.say([(each, [TAKEN]) for each in wanted])
        return wanted

    def _gone(self, servers: set[str]) -> set[str]:
        """Those of the servers that are gone."""
        asked = sorted(servers)
        alive = self._redis.mget([server_key(each) for each in asked]) if asked else []
        return self._absences.look(dict(zip(asked, (each is not None for each in alive), strict=True)))

    def _send(self, session: Session, rows: list[int]) -> None:
        """Hand requests to the engine; one that cannot even be read ends here."""
        batch = []
        with self._lock:
            held = [(row, self._running[row]) for row in rows if row in self._running]
        for row, request in held:
            try:
                batch.append(request.to_request(row))
            except PromptmillError as problem:
                self._end(row, [FAILED, ErrorClass.INVALID_REQUEST.value, problem.message])
            except Exception as problem:
                log.error("a request of the API cannot be read: %s", type(problem).__name__)
                self._end(row, [FAILED, ErrorClass.INTERNAL.value, f"internal error: {type(problem).__name__}"])
        if batch:
            session.add(batch)

    def _pump(self, session: Session) -> None:
        """From the engine to Redis, until nothing runs and nothing comes."""
        heard_at = time.monotonic()
        while True:
            with self._more:
                if not self._running:
                    if not self._more.wait_for(lambda: bool(self._running), LINGER_S):
                        return
                    heard_at = time.monotonic()
            if self._stop.abandoning.is_set():
                self._lost(ErrorClass.WORKER_LOST, "the worker stops")
                return
            heard = session.hear(LOOK_S)
            if heard is not None:
                heard_at = time.monotonic()
                self._tell(*heard)
            elif time.monotonic() - heard_at > session.stall_timeout_s:
                session.stalled()

    def _tell(self, texts: list[LiveText], results: list[Result]) -> None:
        replies: list[tuple[LiveRequest, list[Any]]] = []
        with self._lock:
            for row, text, *more in texts:
                running = self._running.get(row)
                if running is not None and text:
                    replies.append((running, [TEXT, text, *more, self._backend]))
            for result in results:
                ended = self._running.pop(result.row, None)
                if ended is not None:
                    replies.append((ended, self._reply_of(result)))
            self._more.notify_all()
        self._replies.say(replies)

    def _reply_of(self, result: Result) -> list[Any]:
        if isinstance(result, Ok):
            ended_at = self._clock.at(result.timing.finished_at) if result.timing else None
            return [DONE, answer_of(result, ended_at, self._backend)]
        return [FAILED, result.error_class.value, result.message]

    def _read(self, session: Session, ended: threading.Event) -> None:
        """From Redis to the engine: more requests, and those whose client is gone."""
        looked_at = time.monotonic()
        while not ended.is_set():
            try:
                if time.monotonic() - looked_at > HEARTBEAT_S:
                    looked_at = time.monotonic()
                    self._cancel_orphans(session)
                room = self._room()
                if room <= 0:
                    # Not a blocking look: requests that end meanwhile would wait for it, and their slots with them.
                    self._obey(session, self._redis.lpop(self._orders, ORDERS_AT_ONCE) or ())
                    continue
                lists = self._lists()
                found = self._redis.blpop(lists, SHORT_LOOK_S if len(lists) == 1 else 0.25)
                if found is None:
                    continue
                name, data = found[0].decode(), [found[1]]
                data += self._redis.lpop(name, max(1, room) if name == self._queue else ORDERS_AT_ONCE) or []
                if name == self._orders:
                    self._obey(session, data)
                else:
                    self._send(session, self._hold(self._taken(data)))
            except RedisError as problem:
                log.warning("requests of the API wait for Redis: %s", str(problem).splitlines()[0])
                ended.wait(AWAY_S)
            except OSError:
                return  # The host is gone; the thread that reads from it knows and reacts.

    def _room(self) -> int:
        """How many more requests may be taken; waits a moment until it is a good part, so that they come together."""
        slots = self._hosts.slots
        with self._more:
            self._more.wait_for(lambda: len(self._running) <= TAKEN_PER_SLOT * slots - (slots + 1) // 2, SHORT_LOOK_S)
            return TAKEN_PER_SLOT * slots - len(self._running)

    def _cancel_orphans(self, session: Session) -> None:
        """Drop the requests of servers that are gone."""
        with self._lock:
            servers = {each.server for each in self._running.values()}
        gone = self._gone(servers)
        with self._lock:
            ids = {each.id for each in self._running.values() if each.server in gone}
        if ids:
            log.warning("%d requests are dropped: their server is gone", len(ids))
            self._cancel(session, ids)

    def _obey(self, session: Session | None, orders: Iterable[bytes]) -> None:
        """What servers say of requests that this worker holds, or held: without a ``session`` none runs."""
        cancelled = set()
        for data in orders:
            try:
                match json.loads(data):
                    case [str(kind), str(request_id)] if kind == CANCEL:
                        cancelled.add(request_id)
                    case [str(kind), str(request_id), str(server), int(number)] if kind == REPEAT:
                        self._absences.heard(server)
                        self._replies.repeat(request_id, server, number)
                    case _:
                        raise ValueError
            except (ValueError, RecursionError):
                log.warning("a message of %d bytes in %s is dropped: no order of a server", len(data), self._orders)
        if session is not None:
            self._cancel(session, cancelled)

    def _cancel(self, session: Session, ids: set[str]) -> None:
        if not ids:
            return
        with self._lock:
            rows = [row for row, each in self._running.items() if each.id in ids]
            for row in rows:
                del self._running[row]
        self._replies.forget(ids)
        session.cancel(rows)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _end(self, row: int, reply: list[Any]) -> None:
        with self._lock:
            running = self._running.pop(row, None)
        if running is not None:
            self._replies.say([(running, reply)])

    def _refuse(self, error_class: ErrorClass, message: str) -> None:
        with self._lock:
            rows = list(self._running)
        for row in rows:
            self._end(row, [FAILED, error_class.value, message])

    def _lost(self, error_class: ErrorClass, message: str) -> None:
        """What runs cannot go on here. Whether it may begin again is known to its server."""
        with self._lock:
            running, self._running = list(self._running.values()), {}
        self._replies.say([(each, [AGAIN, error_class.value, message[:300]]) for each in running])
