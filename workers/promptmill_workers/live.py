"""Requests that somebody waits for: taken from Redis at once and run beside the chunks, their tokens sent back."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from redis.exceptions import RedisError

from promptmill.addresses import redis_client
from promptmill.broker import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S
from promptmill.errors import PromptmillError
from promptmill.live_wire import (
    AGAIN,
    BEAT_S,
    DONE,
    FAILED,
    FORGET_S,
    MOST_TRIES,
    TAKEN,
    TEXT,
    LiveRequest,
    answer_of,
    cancel_list,
    live_queue,
    reply_list,
    server_key,
)
from promptmill.types import ErrorClass, Ok, Result
from promptmill_workers.host import HostDied, Session
from promptmill_workers.host_keeper import FAIR_S, HostKeeper
from promptmill_workers.host_wire import LiveText
from promptmill_workers.stopping import Stop

log = logging.getLogger("promptmill.worker")

#: Seconds that a look into Redis waits for something.
LOOK_S = 1
#: The same while requests run: a cancelled one frees its slot within it.
SHORT_LOOK_S = 0.05

#: Seconds that a session without requests is kept open for the next one.
LINGER_S = 0.5

#: Seconds before Redis is tried again after it was away.
AWAY_S = 1.0

#: Requests taken per slot: enough that no slot waits for Redis, and no more, so that other workers get their share.
TAKEN_PER_SLOT = 2


@dataclass(slots=True)
class Running:
    """A request that this worker holds."""

    request: LiveRequest
    #: Somebody was shown a part of its answer: it cannot begin again.
    told: bool = False


class LiveLane:
    """One model's urgent requests on one worker. A thread of its own, and while requests run a second one."""

    def __init__(self, model: str, worker_id: str, redis_url: str, hosts: HostKeeper, stop: Stop) -> None:
        self._model = model
        self._worker_id = worker_id
        self._redis: Any = redis_client(
            redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S, socket_timeout=ANSWER_TIMEOUT_S
        )
        self._hosts = hosts
        self._stop = stop
        self._queue, self._cancels = live_queue(model), cancel_list(worker_id, model)
        self._running: dict[int, Running] = {}
        self._row = 0
        self._missed: set[str] = set()
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
                if not self._taking:
                    time.sleep(AWAY_S)
                    continue
                found = self._redis.blpop([self._queue], LOOK_S)
                if found is not None:
                    self._hold(self._taken([found[1]]))
                # What came while a session was closed gets another one.
                while self._running and not self._stop.abandoning.is_set():
                    self._serve()
            except RedisError as problem:
                log.warning("requests of the API wait for Redis: %s", str(problem).splitlines()[0])
                self._stop.draining.wait(AWAY_S)
            except Exception:
                log.exception("the lane of urgent requests failed, and goes on")
                self._stop.draining.wait(AWAY_S)

    # --- one session -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Run requests until none is left. What a host that dies leaves unanswered is tried again."""
        with self._lock:
            rows = list(self._running)
        try:
            with self._hosts.session(self._model, urgent=True) as session:
                session.go_live()
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

    def _hold(self, requests: list[LiveRequest]) -> list[int]:
        """Requests are this worker's now; returns their rows."""
        with self._more:
            rows = list(range(self._row + 1, self._row + 1 + len(requests)))
            self._running |= {row: Running(each) for row, each in zip(rows, requests, strict=True)}
            self._row += len(requests)
            self._more.notify_all()
        return rows

    def _taken(self, found: Iterable[bytes]) -> list[LiveRequest]:
        """Requests that somebody still waits for; each server is told that they are taken."""
        requests = [LiveRequest.decode(each) for each in found]
        wanted = [each for each in requests if each.until > time.time()]
        self._reply([(each, [TAKEN, self._worker_id]) for each in wanted])
        return wanted

    def _send(self, session: Session, rows: list[int]) -> None:
        """Hand requests to the engine; one that cannot even be read ends here."""
        batch = []
        with self._lock:
            held = [(row, self._running[row].request) for row in rows if row in self._running]
        for row, request in held:
            try:
                batch.append(request.to_request(row))
            except PromptmillError as problem:
                self._end(row, [FAILED, ErrorClass.INVALID_REQUEST.value, problem.message])
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
                    running.told = True
                    replies.append((running.request, [TEXT, text, *more]))
            for result in results:
                ended = self._running.pop(result.row, None)
                if ended is not None:
                    replies.append((ended.request, _reply_of(result)))
            self._more.notify_all()
        self._reply(replies)

    def _read(self, session: Session, ended: threading.Event) -> None:
        """From Redis to the engine: more requests, and those that nobody waits for any more."""
        looked_at = time.monotonic()
        while not ended.is_set():
            try:
                if time.monotonic() - looked_at > BEAT_S:
                    looked_at = time.monotonic()
                    self._cancel_orphans(session)
                room = self._room()
                if room <= 0:
                    # Not a blocking look: requests that end meanwhile would wait for it, and their slots with them.
                    self._cancel(session, {each.decode() for each in self._redis.lpop(self._cancels, 256) or ()})
                    continue
                lists = [self._cancels, *([self._queue] if self._taking else [])]
                found = self._redis.blpop(lists, SHORT_LOOK_S if len(lists) == 1 else 0.25)
                if found is None:
                    continue
                name, data = found[0].decode(), [found[1]]
                more = self._redis.lpop(name, max(1, room) if name == self._queue else 256)
                data += more or []
                if name == self._cancels:
                    self._cancel(session, {each.decode() for each in data})
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
        """Drop the requests of servers that are gone. Twice missed is gone: Redis itself may have begun anew."""
        with self._lock:
            servers = sorted({each.request.server for each in self._running.values()})
        alive = self._redis.mget([server_key(each) for each in servers]) if servers else []
        missed = {each for each, found in zip(servers, alive, strict=True) if found is None}
        gone, self._missed = missed & self._missed, missed
        with self._lock:
            ids = {each.request.id for each in self._running.values() if each.request.server in gone}
        if ids:
            log.warning("%d requests are dropped: their server is gone", len(ids))
            self._cancel(session, ids)

    def _cancel(self, session: Session, ids: set[str]) -> None:
        if not ids:
            return
        with self._lock:
            rows = [row for row, each in self._running.items() if each.request.id in ids]
            for row in rows:
                del self._running[row]
        session.cancel(rows)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _end(self, row: int, reply: list[Any]) -> None:
        with self._lock:
            running = self._running.pop(row, None)
        if running is not None:
            self._reply([(running.request, reply)])

    def _refuse(self, error_class: ErrorClass, message: str) -> None:
        with self._lock:
            rows = list(self._running)
        for row in rows:
            self._end(row, [FAILED, error_class.value, message])

    def _lost(self, error_class: ErrorClass, message: str) -> None:
        """Begin again what nobody has seen a part of, at the head of the queue; the rest ends as an error."""
        with self._lock:
            running, self._running = list(self._running.values()), {}
        again = [each.request for each in running if not each.told and each.request.tries < MOST_TRIES]
        over = [each.request for each in running if each.told or each.request.tries >= MOST_TRIES]
        self._reply([(each, [AGAIN]) for each in again])
        self._reply([(each, [FAILED, error_class.value, message[:300]]) for each in over])
        if again:
            data = [replace(each, tries=each.tries + 1).encode() for each in again]
            self._redis.lpush(self._queue, *reversed(data))

    def _reply(self, replies: list[tuple[LiveRequest, list[Any]]]) -> None:
        """One round trip for all of them. A Redis that is away is waited for: somebody waits for the answer."""
        if not replies:
            return
        lists: dict[str, list[bytes]] = defaultdict(list)
        for request, reply in replies:
            lists[reply_list(request.server)].append(json.dumps([request.id, *reply], ensure_ascii=False).encode())
        while True:
            try:
                pipe = self._redis.pipeline(transaction=False)
                for name, data in lists.items():
                    pipe.rpush(name, *data)
                    pipe.expire(name, FORGET_S)
                pipe.execute()
                return
            except RedisError:
                if self._stop.abandoning.wait(AWAY_S):
                    return


def _reply_of(result: Result) -> list[Any]:
    if isinstance(result, Ok):
        return [DONE, answer_of(result)]
    return [FAILED, result.error_class.value, result.message]
