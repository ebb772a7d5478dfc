"""Distributions of any number of values in bounded memory: exact up to EXACT_ROWS, then by narrow buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.columns import Floats, Ints

#: Rows of a job up to which every value is held: 16 MB for each figure.
EXACT_ROWS = 2_000_000

#: Ratio of a bucket's bounds: a value is known to half of it, 0.005 %.
BUCKET_RATIO = 1.0001

#: Seconds of the first and the last bucket; what lies beyond is counted in these.
SHORTEST_S, LONGEST_S = 1e-7, 1e7

_STEP = math.log(BUCKET_RATIO)
_BUCKETS = int(math.log(LONGEST_S / SHORTEST_S) / _STEP) + 2


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles (type 7, linear) and mean of ``n`` values; None where there are none."""

    n: int
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    mean: float | None = None
    #: False: from buckets, each percentile known to 0.005 % of itself. The mean is always exact.
    exact: bool = True

    def to_json(self) -> dict[str, float | int | bool | None]:
        return {
            "p50": self.p50, "p90": self.p90, "p95": self.p95, "p99": self.p99, "mean": self.mean, "n": self.n,
            "exact": self.exact,
        }  # fmt: skip

    def supports(self, percentile: str) -> bool:
        """Whether ``n`` values can tell this percentile."""
        return self.n >= PERCENTILES[percentile][1]


class Times:
    """Seconds of many rows. Values that are not finite are left out."""

    def __init__(self, exact: bool = True) -> None:
        self._exact = exact
        self._parts: list[Floats] = []
        self._counts: Ints = np.zeros(0 if exact else _BUCKETS, dtype=np.int64)
        self._total = 0.0
        self._n = 0

    def add(self, values: Floats) -> None:
        values = values[np.isfinite(values)]
        self._n += len(values)
        self._total += float(values.sum())
        if self._exact:
            self._parts.append(values)
        else:
            np.add.at(self._counts, _bucket(values), 1)

    def percentiles(self, points: Sequence[float]) -> Floats:
        """The values below which ``points`` percent lie."""
        if self._exact:
            found: Floats = np.percentile(self._all(), points)
            return found
        place = (self._n - 1) * np.asarray(points, dtype=np.float64) / 100
        reached = np.cumsum(self._counts)
        low, high = (_value(np.searchsorted(reached, at, side="right")) for at in (np.floor(place), np.ceil(place)))
        return low + (high - low) * (place - np.floor(place))

    def histogram(self, bins: int, top: float) -> tuple[Floats, Floats]:
        """Counts of values from 0 to ``top`` in equal ``bins``, and their edges."""
        if self._exact:
            counts, edges = np.histogram(self._all(), bins, (0, top))
        else:
            filled = np.flatnonzero(self._counts)
            counts, edges = np.histogram(_value(filled), bins, (0, top), weights=self._counts[filled])
        return counts.astype(np.float64), edges

    def distribution(self) -> Distribution:
        if not self._n:
            return Distribution(0)
        points = self.percentiles([point for point, _ in PERCENTILES.values()])
        named = dict(zip(PERCENTILES, points.tolist(), strict=True))
        return Distribution(n=self._n, mean=self._total / self._n, exact=self._exact, **named)

    def __len__(self) -> int:
        return self._n

    def _all(self) -> Floats:
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts) if self._parts else np.empty(0)]
        return self._parts[0]


def distribution(values: Floats) -> Distribution:
    """The distribution of the finite ones of ``values``."""
    times = Times()
    times.add(values)
    return times.distribution()


def _bucket(values: Floats) -> Ints:
    """Bucket 0 is of what is no longer than SHORTEST_S."""
    place = np.log(np.maximum(values, SHORTEST_S) / SHORTEST_S) / _STEP
    return np.minimum(np.ceil(place), _BUCKETS - 1).astype(np.int64)


def _value(bucket: Ints) -> Floats:
    """The middle of a bucket, by ratio."""
    middle: Floats = SHORTEST_S * np.exp((bucket - 0.5) * _STEP)
    return np.where(bucket == 0, 0.0, middle)
