"""Who waits for an answer goes first: requests of jobs give up their slots to urgent ones, and run again later."""

from __future__ import annotations

from collections.abc import Sequence

from promptmill_workers.engines.contract import Engine, EngineRequest, EngineWrapper, Event, RequestKey, TokenEvent

#: Share of the slots that urgent requests may take from running ones. A job goes on beside any number of them.
MOST_TAKEN = 0.5


class Preemption(EngineWrapper):
    """Knows which of the engine's requests are urgent, and makes way for them before a step.

    What a request had generated when it gave way is counted as wasted; it starts again with the same seed.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._urgent: set[RequestKey] = set()
        #: The others, the one added first before the rest.
        self._others: dict[RequestKey, EngineRequest] = {}
        #: Urgent ones that found no room in the step before.
        self._left: set[RequestKey] = set()

    def add(self, requests: Sequence[EngineRequest]) -> None:
        for each in requests:
            if each.urgent:
                self._urgent.add(each.key)
            else:
                self._others[each.key] = each
        self._engine.add(requests)

    def step(self) -> Sequence[Event]:
        self._make_way()
        events = self._engine.step()
        for event in events:
            if not isinstance(event, TokenEvent):
                self._forget(event.key)
        return events

    def cancel(self, key: RequestKey) -> None:
        self._engine.cancel(key)
        self._forget(key)

    def _forget(self, key: RequestKey) -> None:
        """The request has ended or was cancelled."""
        self._urgent.discard(key)
        self._others.pop(key, None)

    def _make_way(self) -> None:
        """Free as many slots as urgent requests wait for, within their share."""
        if not self._urgent:
            return
        queued = set(self._engine.waiting_keys())
        waiting = self._urgent & queued
        slots = self._engine.info.slots
        free = max(0, slots - self._engine.active)
        allowed = max(1, int(slots * MOST_TAKEN)) - len(self._urgent - queued) - free
        # A free slot did not help before: it is memory that is short.
        wanted = len(waiting) - free or int(bool(waiting & self._left))
        self._left = waiting
        running = [key for key in self._others if key not in queued]
        for key in running[::-1][: max(0, min(wanted, allowed))]:
            self._engine.cancel(key)
            self._engine.add([self._others[key]])
