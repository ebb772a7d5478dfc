"""One clock for all machines: the database's. A machine's own clock may be wrong, may be set, and stops in a sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

#: Seconds by which an answer may have taken longer than an earlier one to tell the time as well, for each second
#: between them: clocks drift.
CLOCK_AGING = 0.001

#: Seconds by which two readings may contradict each other while no clock was set: SQLite's ticks in milliseconds.
CLOCK_TICK_S = 0.002


class Reading(NamedTuple):
    """What the database's clock said, and what to add to this machine's ``time.monotonic()`` to have it."""

    now: float
    offset_s: float


class DatabaseClock:
    """What the database's clock says at a moment of ``time.monotonic``. Any thread may ask.

    It is told by the answer that took least: one that came late says little. But each answer says between which bounds
    the truth lies. What was known is outside of them when a clock was set or this machine has slept: then the new
    answer counts, whatever it took.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._took_s = float("inf")
        self._offset_s = self._told_at = 0.0

    def read(self, ask: Callable[[], float]) -> Reading:
        """``ask`` asks the database for its time."""
        sent = time.monotonic()
        there = ask()
        told = time.monotonic()
        with self._lock:
            holds = there - told - CLOCK_TICK_S <= self._offset_s <= there - sent + CLOCK_TICK_S
            if not holds or told - sent <= self._took_s + CLOCK_AGING * (told - self._told_at):
                self._took_s, self._offset_s, self._told_at = told - sent, there - (sent + told) / 2, told
            return Reading(there, self._offset_s)

    def at(self, monotonic_s: float) -> float | None:
        """What it said at this moment; None before the first reading."""
        with self._lock:
            return None if self._took_s == float("inf") else monotonic_s + self._offset_s

    def ahead_s(self) -> float | None:
        """Seconds that it is ahead of this machine's wall clock; None before the first reading."""
        now = self.at(time.monotonic())
        return None if now is None else now - time.time()
