"""Spans and moments as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from promptmill.errors import BadOption

_UNITS_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}

_HINT = "Write a span such as 90s, 45m, 2h30m or 1d."


def span_s(text: str | None, option: str) -> float | None:
    """Seconds of ``90s``, ``2h30m`` or ``1d``. Raises :class:`BadOption` naming the ``option``."""
    if text is None:
        return None
    seconds = _span(text)
    if not seconds:
        raise BadOption(f"'{option}' \"{text}\" is no span of time", option=option, hint=_HINT)
    return seconds


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time, or a span from a now that the database tells: clocks of submitters may be wrong."""

    seconds: float
    is_span: bool = False
    #: The option that gave it, and how, where a time that has passed is to be refused.
    option: str | None = None
    given: str = ""

    def by(self, now: float) -> float:
        """Seconds since the epoch; ``now`` is the database's. Raises :class:`BadOption` for a time that has passed."""
        if self.is_span:
            return now + self.seconds
        if self.option is not None and self.seconds <= now:
            raise BadOption(f"'{self.option}' {self.given} has passed", option=self.option, hint="Give a later time.")
        return self.seconds


def moment(text: str, option: str) -> Moment:
    """A span from now, or a time such as ``2026-12-24T18:00`` (local unless it says).

    Raises :class:`BadOption` naming the ``option``.
    """
    seconds = _span(text)
    if seconds:
        return Moment(seconds, is_span=True)
    try:
        at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise BadOption(
            f"'{option}' \"{text}\" is neither a span nor a time", option=option,
            hint=f"{_HINT[:-1]}, or a time such as 2026-12-24T18:00.",
        ) from None  # fmt: skip
    return Moment(at, option=option, given=text)


def _span(text: str) -> float:
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?[dhms])+", text):
        return 0.0
    return sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([dhms])", text))
