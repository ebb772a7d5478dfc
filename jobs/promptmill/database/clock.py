"""One clock for all machines: the database's. A machine's own clock may be wrong, may be set, and stops in a sleep."""

from __future__ import annotations

import threading
import time

from sqlalchemy.engine import Connection

from promptmill.database.engine import now_of

#: Seconds by which two readings may contradict each other while nothing happened: SQLite's clock ticks in milliseconds.
CLOCK_TICK_S = 0.002

#: Seconds by which late answers and drift may be corrected. A clock that is further off was set, or has slept.
JUMP_S = 1.0


class DatabaseClock:
    """What the database's clock says at a moment of ``time.monotonic()``. Any thread may ask.

    Each answer of the database tells between which bounds the truth lies. What is known stays as long as no answer
    contradicts it, so that times of one machine are exact among themselves. An answer does when a clock was set, when
    this machine has slept, and when an earlier one came late or the clocks have drifted apart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: To be added to moments from ``_since`` on, and to those before.
        self._offset_s = self._before_s = 0.0
        self._since = self._not_before = float("-inf")
        self._is_known = False

    def read(self, db: Connection) -> float:
        """What it says."""
        sent = time.monotonic()
        there = now_of(db)
        self.learn(there, sent, time.monotonic())
        return there

    def learn(self, there: float, sent: float, told: float) -> None:
        """It said ``there`` at some moment between these two."""
        middle = there - (sent + told) / 2
        with self._lock:
            if there - told - CLOCK_TICK_S <= self._offset_s <= there - sent + CLOCK_TICK_S:
                return
            self._before_s = self._offset_s if self._is_known else middle
            # A correction turns no order of moments round. A clock that was set back does.
            is_correction = abs(middle - self._before_s) < JUMP_S
            self._not_before = told + self._before_s if is_correction else float("-inf")
            self._offset_s, self._since, self._is_known = middle, told, True

    def at(self, monotonic_s: float) -> float:
        """What it said at this moment, which may lie before the last reading. There has been one."""
        with self._lock:
            if monotonic_s < self._since:
                return monotonic_s + self._before_s
            return max(monotonic_s + self._offset_s, self._not_before)

    def ahead_s(self) -> float | None:
        """Seconds that it is ahead of this machine's wall clock; None before the first reading."""
        return self.at(time.monotonic()) - time.time() if self._is_known else None
