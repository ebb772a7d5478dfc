"""Two sets of rows that are not the same rows, and several runs of two settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from promptmill.scoring.statistics.clusters import Clusters, Floats, Interval
from promptmill.scoring.statistics.means import share_interval
from promptmill.scoring.statistics.paired import LEAST_CLUSTERS, Change, by_error

#: Fewest runs of one setting that tell the noise between runs.
LEAST_RUNS = 3


def shares(before: Floats, after: Floats, of_before: Clusters, of_after: Clusters) -> Change:
    """Difference of two means of values from 0 to 1, of different rows.

    The interval is Newcombe's (1998, method 10), of the intervals of either side. Truths that are no copies are tested
    by Fisher's exact test, all else by Welch's.
    """
    if not len(before) or not len(after):
        return Change(math.nan)
    one, two = float(before.mean()), float(after.mean())

    def within(level: float) -> Interval:
        (low, high), (low_after, high_after) = (
            share_interval(values, clusters, level) or (0.0, 1.0)
            for values, clusters in ((before, of_before), (after, of_after))
        )
        return (
            two - one - math.hypot(two - low_after, high - one),
            two - one + math.hypot(high_after - two, one - low),
        )

    plain = of_before.count == len(before) and of_after.count == len(after)
    if plain and np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all():
        from scipy.stats import fisher_exact

        table = [[values.sum(), len(values) - values.sum()] for values in (before, after)]
        return Change(two - one, float(fisher_exact(np.array(table)).pvalue), within)
    tested = means(before, after, of_before, of_after)
    return Change(two - one, tested.p, within)


def means(before: Floats, after: Floats, of_before: Clusters, of_after: Clusters) -> Change:
    """Difference of two means of different rows: Welch's t, between clusters."""
    value = float(after.mean() - before.mean()) if len(before) and len(after) else math.nan
    if min(of_before.count, of_after.count) < LEAST_CLUSTERS:
        return Change(value)
    errors = [_error(before, of_before), _error(after, of_after)]
    freedom = _welch([error**2 for error in errors], [of_before.effective - 1, of_after.effective - 1])
    return by_error(value, math.hypot(*errors), freedom + 1)


def _error(values: Floats, clusters: Clusters) -> float:
    off = clusters.sums(values) - float(values.mean()) * clusters.sizes
    return math.sqrt(float((off**2).sum()) * clusters.count / (clusters.count - 1)) / len(values)


def runs(before: Sequence[float], after: Sequence[float], others: Sequence[float] = ()) -> Change:
    """Change, as a share, of a figure that each run has one of: Welch's t of its logs.

    Where a side has fewer than LEAST_RUNS, ``others``, further runs of what both sides ask, tell the noise between
    runs: it is pooled then. Fewer than LEAST_RUNS of them do not.
    """
    if not before or not after or min(*before, *after, *others) <= 0:
        return Change(math.nan)
    one, two, more = (np.log(np.array(each, dtype=np.float64)) for each in (before, after, others))
    log = float(two.mean() - one.mean())
    if min(len(one), len(two)) >= LEAST_RUNS:
        parts = [float(each.var(ddof=1)) / len(each) for each in (one, two)]
        error, freedom = math.fsum(parts) ** 0.5, _welch(parts, [len(one) - 1, len(two) - 1])
    elif len(more) >= LEAST_RUNS:
        freedom = sum(len(each) - 1.0 for each in (one, two, more))
        pooled = sum(float(((each - each.mean()) ** 2).sum()) for each in (one, two, more)) / freedom
        error = (pooled * (1 / len(one) + 1 / len(two))) ** 0.5
    else:
        return Change(math.expm1(log))
    if error == 0:
        return Change(math.expm1(log), 1.0 if log == 0 else 0.0, lambda level: (math.expm1(log), math.expm1(log)))
    found = by_error(log, error, 1 + freedom)

    def within(level: float) -> Interval:
        low, high = found.interval(level) or (log, log)
        return math.expm1(low), math.expm1(high)

    return Change(math.expm1(log), found.p, within)


def _welch(variances: Sequence[float], freedom: Sequence[float]) -> float:
    """Degrees of freedom of a sum of variances (Welch 1947)."""
    total = math.fsum(variances)
    below = math.fsum(each * each / max(of, 1.0) for each, of in zip(variances, freedom, strict=True))
    return total * total / below if below else 1.0
