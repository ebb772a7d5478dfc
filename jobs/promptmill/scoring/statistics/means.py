"""Intervals of rates and means."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from promptmill.scoring.statistics.clusters import Clusters, Floats, Interval

#: Rows off the commoner end whose worth the assumed variance has. With 0.5, the intervals of Brier scores of confident
#: models cover at 10 rows as at 1,000, and those of closeness are as narrow as Student's (docs/metrics.md).
ASSUMED = 0.5


def wilson(successes: float, n: float, level: float = 0.95) -> Interval | None:
    """The Wilson interval (1927) of the rate ``successes / n``; None of nothing. Neither need be whole."""
    if n <= 0:
        return None
    # SciPy has it, but its statistics take more than a second to import, and every report has a rate.
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def effective_rows(values: Floats, clusters: Clusters) -> float:
    """Independent rows that would tell the mean of ``values`` within 0 and 1 as well as these do.

    As many as a variance of m (1 - m), that of truths, needs for the variance of the mean between clusters. Where few
    rows lie off the ends, that variance is not known: then it is taken as if copies told nothing. Truths that are no
    copies are as many as they are.
    """
    n, mean = len(values), float(values.mean())
    assumed = clusters.copies
    off = clusters.sums(values) - mean * clusters.sizes
    spread = mean * (1 - mean) / n
    evidence = clusters.count * min(mean, 1 - mean)
    ratio = float((off**2).sum()) / n**2 / spread if spread > 1e-15 else assumed
    return n * (evidence + ASSUMED) / (evidence * ratio + ASSUMED * assumed)


def share_interval(values: Floats, clusters: Clusters, level: float = 0.95) -> Interval | None:
    """The interval of a mean of values from 0 to 1; of truths that are no copies it is Wilson's. None of no rows.

    Wilson's interval of :func:`effective_rows`. Where every row has as many copies, their means are the rows. Else
    Student's quantile takes the place of the normal one (Korn and Graubard 1998), with as many degrees of freedom as
    there are effective clusters.
    """
    if not len(values):
        return None
    if clusters.sizes.min() == clusters.sizes.max():
        values, clusters = clusters.sums(values) / clusters.sizes, Clusters.alone(clusters.count)
    n = effective_rows(values, clusters)
    if clusters.count < len(values):
        n *= _normal_by_student(clusters.effective - 1, level)
    low, high = wilson(float(values.mean()) * n, n, level) or (0.0, 1.0)
    return max(0.0, low), min(1.0, high)


def _normal_by_student(freedom: float, level: float) -> float:
    from scipy.special import stdtrit

    return float((NormalDist().inv_cdf((1 + level) / 2) / stdtrit(max(freedom, 1.0), (1 + level) / 2)) ** 2)


def mean_interval(values: Floats, clusters: Clusters, bounds: Interval, level: float = 0.95) -> Interval | None:
    """The interval of a mean of values within ``bounds``; without bounds Student's t, between clusters.

    None of equal values without bounds: they do not tell how far the next one may be.
    """
    low, high = bounds
    if np.isfinite(low) and np.isfinite(high):
        share = share_interval((values - low) / (high - low), clusters, level)
        return None if share is None else (low + share[0] * (high - low), low + share[1] * (high - low))
    if clusters.count < 2:
        return None
    from scipy.special import stdtrit

    mean = float(values.mean())
    off = clusters.sums(values) - mean * clusters.sizes
    error = float((off**2).sum() * clusters.count / (clusters.count - 1)) ** 0.5 / len(values)
    if error <= 1e-9 * abs(mean):
        return None
    half = float(stdtrit(clusters.count - 1, (1 + level) / 2)) * error
    return max(low, mean - half), min(high, mean + half)
