"""Exponential back-off: how long to wait before something that failed is tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """The wait after the first failure, doubled for each further one in a row, up to the longest. Seconds."""

    first_s: float
    longest_s: float

    def delay_s(self, failures: int) -> float:
        """The wait after so many failures in a row, counted from 1."""
        return min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 60))
