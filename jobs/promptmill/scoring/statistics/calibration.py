"""Whether probabilities are what happens: the expected calibration error, without what chance adds to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from promptmill.scoring.statistics.clusters import SEED, Clusters, Floats, Interval, Truths

#: Bins of equal mass (Nixon et al. 2019, "Measuring Calibration in Deep Learning").
BINS = 10

#: Drawings of the bins' distances, and the largest multiple of the distances found that is tried.
DRAWS, MOST = 1000, 4.0


@dataclass(frozen=True, slots=True)
class Bins:
    """Rows of like confidence, a value a bin: mean confidence, share of yes, rows, and rows that are no copies."""

    confidence: Floats
    share: Floats
    n: Floats
    effective: Floats

    def to_json(self) -> list[dict[str, float]]:
        columns = (self.confidence.tolist(), self.share.tolist(), self.n.tolist())
        return [dict(zip(("confidence", "share", "n"), each, strict=True)) for each in zip(*columns, strict=True)]


def bins(confidence: Floats, truth: Truths, clusters: Clusters) -> Bins:
    """Rows of one confidence are never divided, so that their order cannot matter."""
    levels, level, rows = np.unique(confidence, return_inverse=True, return_counts=True)
    place = np.minimum(((np.cumsum(rows) - rows / 2) / rows.sum() * BINS).astype(int), BINS - 1)
    _, bin_ = np.unique(place[level], return_inverse=True)
    n = np.bincount(bin_).astype(np.float64)
    effective = np.array([clusters.at(bin_ == number).effective for number in range(len(n))])
    return Bins(np.bincount(bin_, levels[level]) / n, np.bincount(bin_, truth) / n, n, effective)


def raw_error(found: Bins) -> float:
    """The mean distance of confidence and share, weighted by rows. Chance alone makes it larger than nothing."""
    return float((np.abs(found.share - found.confidence) * found.n).sum() / found.n.sum())


def error(found: Bins) -> float:
    """The same less what perfectly calibrated probabilities would show by chance, subtracted in squares."""
    by_chance = _by_chance(found) * (2 / np.pi) ** 0.5
    return float(max(0.0, raw_error(found) ** 2 - ((by_chance * found.n).sum() / found.n.sum()) ** 2) ** 0.5)


def error_interval(found: Bins, level: float = 0.95) -> Interval:
    """Multiples of the distances found under which the raw error would be no surprise.

    The bins' distances are drawn with the noise of their shares (of calibrated ones at 0), and the interval is what a
    two-sided test at this level leaves. Sure and right probabilities have no distance: so many rows may hide one as
    large as the rate of an event that they do not show (Clopper and Pearson 1934).
    """
    weight = found.n / found.n.sum()
    off, observed = np.abs(found.share - found.confidence), raw_error(found)
    noise = np.random.default_rng(SEED).normal(size=(DRAWS, len(found.n)))
    shares = (found.share * found.effective + 1) / (found.effective + 2)
    spread = np.sqrt(shares * (1 - shares) / found.effective)

    def below(times: float) -> float:
        """How often the raw error comes out below the observed one, were the true distances so many times these."""
        drawn = np.abs(off * times + noise * (spread if times else _by_chance(found)))
        return float((drawn @ weight <= observed).mean())

    def where(share: float) -> float:
        if below(0.0) < share:
            return 0.0
        low, high = 0.0, MOST
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) > share else (low, middle)
        return low

    point, hidden = error(found), 1 - ((1 - level) / 2) ** (1 / float(found.effective.sum()))
    high = min(1.0, max(where((1 - level) / 2) * observed, hidden))
    return min(where((1 + level) / 2) * observed, point), max(high, point)


def _by_chance(found: Bins) -> Floats:
    """The standard deviation of each bin's share, were its probabilities true."""
    return np.sqrt(np.maximum(found.confidence * (1 - found.confidence), 1e-9) / found.effective)
