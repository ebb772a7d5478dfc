"""Distributions, overlaps and curves: from columns of numbers to the few that are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promptmill.reports.figures.columns import Floats, Series

#: Slices of the throughput curve: as many as fit a line of a narrow terminal.
CURVE_SLICES = 56

#: Seconds under which an answer counts as given at one moment: a rate over less would be noise.
SHORTEST_S = 0.001

#: Slices of time in which rows are counted where a job has too many to be sorted: 3 ms of a run of 4 hours.
PEAK_SLICES = 2**22


def tpot(series: Series) -> Floats:
    """Seconds per output token after the first, of rows with two or more."""
    several = series.output_tokens >= 2
    spent = series.finished_at[several] - series.first_token_at[several]
    gaps: Floats = spent / (series.output_tokens[several] - 1)
    return gaps


def queued(series: Series) -> Floats:
    """Seconds from publishing to a slot. Clocks may disagree a little: what is negative then is 0."""
    return np.maximum(series.admitted_at - series.enqueued_at, 0.0)


def peak_active(admitted: Floats, finished: Floats) -> int:
    """Most rows in a slot at one time. A row that ends when another begins has made room for it."""
    if not len(admitted):
        return 0
    begun = np.sort(admitted)
    ended = np.searchsorted(np.sort(finished), begun, side="right")
    return int(np.max(np.arange(1, len(begun) + 1) - ended, initial=0))


def most_at_once(spans: Sequence[tuple[float, float, int]]) -> int:
    """The largest sum of sizes of (begin, end, size) spans that overlap."""
    changes = [(begin, 1, size) for begin, _, size in spans] + [(end, 0, -size) for _, end, size in spans]
    most = now = 0
    for _, _, size in sorted(changes):
        now += size
        most = max(most, now)
    return most


def covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds covered by (begin, end) spans that may overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class Active:
    """Rows in a slot over the time of a job: how long in all, and how many at most at one time."""

    def __init__(self, begin: float, end: float, exact: bool) -> None:
        self._begin = begin
        self._slice_s = max(end - begin, SHORTEST_S) / PEAK_SLICES
        self._exact = exact
        self._peak = 0
        self._changes = np.zeros(0 if exact else PEAK_SLICES + 1, dtype=np.int32)
        self.rows = 0
        self.active_s = 0.0

    def add(self, admitted: Floats, finished: Floats) -> None:
        """More rows. Where it is exact, all rows at once."""
        self.rows += len(admitted)
        self.active_s += float((finished - admitted).sum())
        if self._exact:
            self._peak = peak_active(admitted, finished)
            return
        for at, change in ((admitted, 1), (finished, -1)):
            if len(at):
                place = np.clip(((at - self._begin) / self._slice_s).astype(np.int64), 0, PEAK_SLICES)
                # Rows of a block are near each other in time: they are counted in their span, ten times as fast.
                first = int(place.min())
                counts = np.bincount(place - first)
                self._changes[first : first + len(counts)] += change * counts

    @property
    def peak(self) -> int:
        """Most rows at one time; of what began and ended within one of PEAK_SLICES, nothing is seen."""
        return self._peak if self._exact else int(np.cumsum(self._changes).max(initial=0))


@dataclass(frozen=True, slots=True)
class Curve:
    """Output tokens per second in equal slices of the wall time. ``tokens`` is the curve's integral."""

    slice_s: float
    output_tps: tuple[float, ...]

    def to_json(self) -> dict[str, float | list[float]]:
        return {"slice_s": self.slice_s, "output_tps": list(self.output_tps)}

    @property
    def tokens(self) -> float:
        return self.slice_s * sum(self.output_tps)


class Spread:
    """Tokens of rows over time, in equal slices: those of a row evenly from one of its moments to another.

    A ramp of rate r is r(t - begin) from its begin on, less r(t - end) from its end on; summed up to an edge this
    needs only the sums of r and of r times the moment, per slice, and no sorting.
    """

    def __init__(self, begin: float, end: float, slices: int) -> None:
        self._begin, self._slices = begin, slices
        self.slice_s = (end - begin) / slices
        self._given = np.zeros(slices)
        self._slope = np.zeros(slices)
        self._offset = np.zeros(slices)

    def at(self, moments: Floats, tokens: Floats) -> None:
        """Tokens given at one moment each."""
        self._given += self._summed(moments - self._begin, tokens)

    def between(self, begins: Floats, ends: Floats, tokens: Floats) -> None:
        """Tokens given evenly between two moments each; at the second one where there is no time between."""
        long = ends - begins >= SHORTEST_S
        if not long.all():
            self.at(ends[~long], tokens[~long])
            begins, ends, tokens = begins[long], ends[long], tokens[long]
        rate = tokens / (ends - begins)
        for moments, rates in ((begins - self._begin, rate), (ends - self._begin, -rate)):
            self._slope += self._summed(moments, rates)
            self._offset += self._summed(moments, rates * moments)

    def _summed(self, moments: Floats, weights: Floats) -> Floats:
        place = np.clip((moments / self.slice_s).astype(np.int64), 0, self._slices - 1)
        sums: Floats = np.bincount(place, weights, self._slices).astype(np.float64)
        return sums

    def tokens(self) -> Floats:
        """Per slice."""
        edges = self.slice_s * np.arange(1, self._slices + 1)
        ramps = edges * np.cumsum(self._slope) - np.cumsum(self._offset)
        return self._given + np.diff(np.concatenate([[0.0], ramps]))


def add_output(spread: Spread, rows: Series) -> None:
    """The output tokens of each row spread evenly from its first to its last, the first one at its own time."""
    known = np.isfinite(rows.first_token_at)
    first, last, tokens = rows.first_token_at[known], rows.finished_at[known], rows.output_tokens[known]
    several = (tokens >= 2) & (last - first >= SHORTEST_S)
    spread.at(first, np.where(several, np.minimum(tokens, 1), tokens))
    spread.between(first[several], last[several], tokens[several] - 1)
