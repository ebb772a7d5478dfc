"""Several tests asked together: corrected p-values, and intervals at the level at which each test was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promptmill.scoring.statistics.clusters import Interval
from promptmill.scoring.statistics.paired import Change

#: Level of a family of tests.
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """A change as its family has it. Its interval is without zero exactly where ``is_change``."""

    p: float | None
    ci: Interval | None
    #: Coverage of the interval: 0.95 where it was tested alone.
    level: float
    is_change: bool


def holm(changes: Sequence[Change]) -> list[Verdict]:
    """Verdicts by Holm's step-down procedure (1979).

    Each interval has the level at which its own test was decided, so that it tells the same as the test does.
    """
    ranked = sorted((change.p, place) for place, change in enumerate(changes) if change.p is not None)
    found = [Verdict(None, change.interval(), 1 - ALPHA, False) for change in changes]
    reached, stopped = 0.0, None
    for rank, (p, place) in enumerate(ranked):
        asked = len(ranked) - rank if stopped is None else stopped
        reached = max(reached, min(1.0, p * (len(ranked) - rank)))
        if reached >= ALPHA and stopped is None:
            stopped = asked
        level = 1 - ALPHA / asked
        found[place] = Verdict(reached, _agreeing(changes[place], level, stopped is None), level, stopped is None)
    return found


def _agreeing(change: Change, level: float, is_change: bool) -> Interval | None:
    """The interval; where an exact test is surer or less sure than it, with its end at zero."""
    interval = change.interval(level)
    if interval is None:
        return None
    low, high = interval
    if not is_change:
        return min(low, 0.0), max(high, 0.0)
    smallest = abs(change.value) * 1e-3
    return (max(low, smallest), high) if change.value > 0 else (low, min(high, -smallest))
