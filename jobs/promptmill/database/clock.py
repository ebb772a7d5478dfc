"""One clock for all machines: the database's. A machine's own clock may be wrong, may be set, and stops in a sleep."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from sqlalchemy.engine import Connection

from promptmill.database.engine import now_of

#: Seconds by which two readings may contradict each other while nothing happened: SQLite's clock ticks in milliseconds.
CLOCK_TICK_S = 0.002

#: Seconds by which late answers and drift may be corrected. A clock that is further off was set, or has slept.
JUMP_S = 1.0


class _Offsets(NamedTuple):
    """What is added to a moment: replaced as a whole, so that it is read without a lock."""

    #: For moments from ``since`` on, and for those before.
    offset_s: float
    before_s: float
    since: float
    #: The earliest time for moments from ``since`` on.
    not_before: float


class DatabaseClock:
    """What the database's clock says at a moment of ``time.monotonic()``. Any thread may ask.

    Each answer of the database tells between which bounds the truth lies. What is known stays as long as no answer
    contradicts it, so that times of one machine are exact among themselves. An answer does when a clock was set, when
    this machine has slept, and when an earlier one came late or the clocks have drifted apart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_known = False
        self._offsets = _Offsets(0.0, 0.0, float("-inf"), float("-inf"))

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
            known = self._offsets
            if there - told - CLOCK_TICK_S <= known.offset_s <= there - sent + CLOCK_TICK_S:
                return
            before_s = known.offset_s if self._is_known else middle
            # A correction turns no order of moments round. A clock that was set back does.
            is_correction = abs(middle - before_s) < JUMP_S
            self._offsets = _Offsets(middle, before_s, told, told + before_s if is_correction else float("-inf"))
            self._is_known = True

    def at(self, monotonic_s: float) -> float:
        """What it said at this moment, which may lie before the last reading. There has been one."""
        offset_s, before_s, since, not_before = self._offsets
        return monotonic_s + before_s if monotonic_s < since else max(monotonic_s + offset_s, not_before)

    def ahead_s(self) -> float | None:
        """Seconds that it is ahead of this machine's wall clock; None before the first reading."""
        return self.at(time.monotonic()) - time.time() if self._is_known else None
