"""Distributions, overlaps and curves: from columns of numbers to the few that are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promptmill.metrics import PERCENTILES
from promptmill.reports.rows import Floats, Series

#: Slices of the throughput curve: as many as fit a line of a narrow terminal.
CURVE_SLICES = 56

#: Seconds under which an answer counts as given at one moment: a rate over less would be noise.
SHORTEST_S = 0.001


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles (type 7, linear) and mean of ``n`` values; None where there are none."""

    n: int
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        return {"p50": self.p50, "p90": self.p90, "p95": self.p95, "p99": self.p99, "mean": self.mean, "n": self.n}

    def supports(self, percentile: str) -> bool:
        """Whether ``n`` values can tell this percentile."""
        return self.n >= PERCENTILES[percentile][1]


def distribution(values: Floats) -> Distribution:
    """The distribution of the finite ones of ``values``."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Distribution(0)
    points = np.percentile(values, [point for point, _ in PERCENTILES.values()])
    named = dict(zip(PERCENTILES, points.tolist(), strict=True))
    return Distribution(n=len(values), mean=float(values.mean()), **named)


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


def throughput_curve(series: Series, begin: float, end: float, slices: int = CURVE_SLICES) -> Curve | None:
    """The output tokens of each row spread evenly from its first to its last, the first one at its own time.

    None when there is no time to divide.
    """
    if not len(series) or end <= begin:
        return None
    edges = np.linspace(0.0, end - begin, slices + 1)
    first, last = series.first_token_at - begin, series.finished_at - begin
    spread = (last - first >= SHORTEST_S) & (series.output_tokens >= 2)
    produced = _points(first, np.where(spread, np.minimum(series.output_tokens, 1), series.output_tokens), edges)
    produced += _ramps(first[spread], last[spread], series.output_tokens[spread] - 1, edges)
    slice_s = float(edges[1])
    return Curve(slice_s, tuple((produced / slice_s).tolist()))


def _points(at: Floats, tokens: Floats, edges: Floats) -> Floats:
    """Tokens given at one moment each, per slice."""
    counts: Floats = np.histogram(at, bins=edges, weights=tokens)[0].astype(np.float64)
    return counts


def _ramps(begin: Floats, end: Floats, tokens: Floats, edges: Floats) -> Floats:
    """Tokens given evenly from ``begin`` to ``end``, per slice, without sorting.

    A ramp of rate r is r(t - begin) from its begin on, less r(t - end) from its end on; summed up to an edge this
    needs only the sums of r and of r times the moment, per slice.
    """
    rate = tokens / (end - begin)
    moments = np.concatenate([begin, end])
    rates = np.concatenate([rate, -rate])
    slope = np.cumsum(np.histogram(moments, bins=edges, weights=rates)[0])
    offset = np.cumsum(np.histogram(moments, bins=edges, weights=rates * moments)[0])
    given = np.concatenate([[0.0], edges[1:] * slope - offset])
    return np.diff(given)
