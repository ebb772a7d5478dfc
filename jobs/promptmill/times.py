"""Spans and moments as people write them."""

from __future__ import annotations

import re
import time
from datetime import datetime

from promptmill.errors import JobError

_UNITS_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}

_HINT = "Write a span such as 90s, 45m, 2h30m or 1d."


def span_s(text: str | None, option: str) -> float | None:
    """Seconds of ``90s``, ``2h30m`` or ``1d``. Raises :class:`JobError` naming the ``option``."""
    if text is None:
        return None
    seconds = _span(text)
    if not seconds:
        raise JobError(f"{option} {text!r} is no span of time", hint=_HINT)
    return seconds


def moment(text: str | None, option: str) -> float | None:
    """Seconds since the epoch of a span from now, or of a time such as ``2026-12-24T18:00`` (local unless it says).

    Raises :class:`JobError` naming the ``option``, also for a moment that has passed.
    """
    if text is None:
        return None
    seconds = _span(text)
    if seconds:
        return time.time() + seconds
    try:
        at = datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise JobError(
            f"{option} {text!r} is neither a span nor a time", hint=f"{_HINT[:-1]}, or a time such as 2026-12-24T18:00."
        ) from None
    if at <= time.time():
        raise JobError(f"{option} {text} has passed", hint="Give a later time.")
    return at


def _span(text: str) -> float:
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?[dhms])+", text):
        return 0.0
    return sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([dhms])", text))
