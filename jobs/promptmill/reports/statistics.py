"""How sure a difference is: intervals and p-values of ratios of means, of rates, and of several figures at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from promptmill.reports.scan import Floats

#: Resamples of a bootstrap, and its seed: the same rows give the same interval.
RESAMPLES = 2000
SEED = 20_260_101

#: Fewest clusters that tell a variance.
LEAST_CLUSTERS = 5

#: Level of every test and interval.
ALPHA = 0.05

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Change:
    """A change with its 95 % interval: a ratio minus one, or a difference of rates. None: cannot be told."""

    value: float
    ci95: tuple[float, float] | None
    p: float | None


def paired_ratio(before: Floats, after: Floats, clusters: Ints) -> Change:
    """Change of the mean of ``after`` against ``before``, of the same rows.

    Clusters are resampled whole, because requests of one batch share their fate; the spread of the log ratio over the
    resamples gives a t interval with (clusters - 1) degrees of freedom, which few clusters need.
    """
    index, count = _numbered(clusters)
    sums = np.stack([np.bincount(index, before, count), np.bincount(index, after, count)])
    value = sums[1].sum() / sums[0].sum() - 1 if sums[0].sum() > 0 else math.nan
    if count < LEAST_CLUSTERS or not (sums.sum(axis=1) > 0).all():
        return Change(value, None, None)
    drawn = sums @ _draws(count)
    return _of_logs(value, float(np.std(np.log(drawn[1] / drawn[0]), ddof=1)), count - 1)


def unpaired_ratio(before: Floats, of_before: Ints, after: Floats, of_after: Ints) -> Change:
    """The same for two sets of rows whose batches do not correspond."""
    value = float(after.mean() / before.mean() - 1) if len(before) and len(after) and before.mean() > 0 else math.nan
    spreads = [_mean_spread(before, of_before), _mean_spread(after, of_after)]
    known = [spread for spread in spreads if spread is not None]
    if len(known) < 2 or math.isnan(value):
        return Change(value, None, None)
    return _of_logs(value, math.hypot(known[0][0], known[1][0]), min(known[0][1], known[1][1]) - 1)


def _mean_spread(values: Floats, clusters: Ints) -> tuple[float, int] | None:
    """Standard error of the log of a mean, and the number of clusters."""
    index, count = _numbered(clusters)
    if count < LEAST_CLUSTERS:
        return None
    sums = np.stack([np.bincount(index, values, count), np.bincount(index, minlength=count).astype(np.float64)])
    drawn = sums @ _draws(count)
    if not (drawn > 0).all():
        return None
    return float(np.std(np.log(drawn[0] / drawn[1]), ddof=1)), count


def _numbered(clusters: Ints) -> tuple[Ints, int]:
    names, index = np.unique(clusters, return_inverse=True)
    return index.astype(np.int64), len(names)


def _draws(count: int) -> Floats:
    """How often each cluster is in each resample: one column a resample."""
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).T.astype(np.float64)
    return np.ascontiguousarray(drawn)


def _of_logs(value: float, spread: float, freedom: int) -> Change:
    # SciPy's statistics take more than a second to import.
    from scipy.stats import t

    if spread == 0:
        return Change(value, (value, value), 1.0 if value == 0 else 0.0)
    log, width = math.log1p(value), float(t.ppf(1 - ALPHA / 2, freedom)) * spread
    p = 2 * float(t.sf(abs(log) / spread, freedom))
    return Change(value, (math.expm1(log - width), math.expm1(log + width)), p)


def paired_rates(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[Change, int, int]:
    """Difference of two rates of the same rows; and rows that only the one, or only the other, has.

    McNemar's exact test on these; the interval is Bonett and Price's adjusted Wald for paired proportions (2012).
    """
    from scipy.stats import binomtest, norm

    n, lost, won = len(before), int((before & ~after).sum()), int((~before & after).sum())
    if n == 0:
        return Change(math.nan, None, None), 0, 0
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    down, up = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    width = float(norm.ppf(1 - ALPHA / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    interval = (max(-1.0, up - down - width), min(1.0, up - down + width))
    return Change((won - lost) / n, interval, p), lost, won


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for being asked together (Holm 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    reached = 0.0
    for rank, (p, index) in enumerate(known):
        reached = max(reached, min(1.0, p * (len(known) - rank)))
        corrected[index] = reached
    return corrected
