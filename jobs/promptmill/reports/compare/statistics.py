"""How sure a difference is: intervals and p-values of ratios of means, of rates, and of several figures at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from promptmill.reports.figures.columns import Floats
from promptmill.scoring.scorers.intervals import wilson
from promptmill.scoring.scorers.pairs import mcnemar

#: Resamples of a bootstrap, and its seed: the same rows give the same interval.
RESAMPLES = 2000
SEED = 20_260_101

#: Fewest runs of one setting that tell the noise between runs.
LEAST_RUNS = 3

#: Fewest clusters that tell a variance.
LEAST_CLUSTERS = 5

#: Fewest pairs of rows whose differences tell a mean.
LEAST_PAIRS = 6

#: Most clusters that are resampled: of more, neighbours are taken together, which keeps an interval at least as wide.
MOST_CLUSTERS = 100

#: Resamples that are held at a time.
DRAWN_AT_ONCE = 200

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
    sums = np.stack([np.bincount(index, each, count) for each in (before, after)]).astype(np.float64)
    value = sums[1].sum() / sums[0].sum() - 1 if sums[0].sum() > 0 else math.nan
    if count < LEAST_CLUSTERS or not (sums.sum(axis=1) > 0).all():
        return Change(value, None, None)
    drawn = _resampled(sums)
    return _of_logs(value, float(np.std(np.log(drawn[1] / drawn[0]), ddof=1)), count - 1)


def crossed_ratio(before: Floats, after: Floats, of_before: Ints, of_after: Ints) -> Change:
    """The same where the batches of the two runs hold different rows: rows stay pairs, clustered both ways.

    The variance of the log ratio, linearised, is that over the batches of the one run, plus that over those of the
    other, less that over their intersections (Cameron, Gelbach and Miller 2011).
    """
    if before.sum() <= 0 or after.sum() <= 0:
        return Change(math.nan, None, None)
    value = after.sum() / before.sum() - 1
    influence = after / after.sum() - before / before.sum()
    both = of_before * (int(of_after.max(initial=0)) + 1) + of_after
    (one, n_one), (two, n_two), (cross, _) = (_between(influence, each) for each in (of_before, of_after, both))
    if min(n_one, n_two) < LEAST_CLUSTERS:
        return Change(value, None, None)
    # The difference may come out below either part by chance; the larger of the two is what is certain.
    return _of_logs(value, math.sqrt(max(one + two - cross, one, two)), min(n_one, n_two) - 1)


def _between(influence: Floats, clusters: Ints) -> tuple[float, int]:
    """Variance of the sum of ``influence`` when clusters are drawn whole, and the number of clusters."""
    index, count = _numbered(clusters)
    sums = np.bincount(index, influence, count)
    return float((sums**2).sum()) * count / max(count - 1, 1), count


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
    drawn = _resampled(sums)
    if not (drawn > 0).all():
        return None
    return float(np.std(np.log(drawn[0] / drawn[1]), ddof=1)), count


def _numbered(clusters: Ints) -> tuple[Ints, int]:
    """Clusters as numbers from 0, and how many there are: at most MOST_CLUSTERS."""
    names, index = np.unique(clusters, return_inverse=True)
    together = -(-len(names) // MOST_CLUSTERS) or 1
    return index.astype(np.int64) // together, -(-len(names) // together)


def _resampled(sums: Floats) -> Floats:
    """Each row of ``sums`` (one column a cluster) summed over RESAMPLES draws of as many clusters, with repetition."""
    generator = np.random.default_rng(SEED)
    count = sums.shape[1]
    shares = np.full(count, 1 / count)
    parts = [
        sums @ generator.multinomial(count, shares, size=DRAWN_AT_ONCE).T.astype(np.float64)
        for _ in range(RESAMPLES // DRAWN_AT_ONCE)
    ]
    return np.concatenate(parts, axis=1)


def repeated_ratio(before: Sequence[float], after: Sequence[float]) -> Change:
    """Change of a figure that each run has one of, over several runs of either: a t interval of the log ratio.

    Welch's degrees of freedom; fewer than LEAST_RUNS on either side tell nothing of the noise between runs.
    """
    if not before or not after or min(*before, *after) <= 0:
        return Change(math.nan, None, None)
    one, two = np.log(before), np.log(after)
    value = float(math.expm1(two.mean() - one.mean()))
    if min(len(one), len(two)) < LEAST_RUNS:
        return Change(value, None, None)
    parts = [float(each.var(ddof=1)) / len(each) for each in (one, two)]
    spread = math.sqrt(sum(parts))
    below = sum(part**2 / (len(each) - 1) for part, each in zip(parts, (one, two), strict=True))
    return _of_logs(value, spread, sum(parts) ** 2 / below if below else 1)


def _of_logs(value: float, spread: float, freedom: float) -> Change:
    # SciPy's statistics take more than a second to import.
    from scipy.stats import t

    if spread == 0:
        return Change(value, (value, value), 1.0 if value == 0 else 0.0)
    log, width = math.log1p(value), float(t.ppf(1 - ALPHA / 2, freedom)) * spread
    p = 2 * float(t.sf(abs(log) / spread, freedom))
    return Change(value, (math.expm1(log - width), math.expm1(log + width)), p)


def paired_rates(n: int, lost: int, won: int) -> Change:
    """Difference of two rates of the same ``n`` rows, of which so many only the one, or only the other, has.

    McNemar's exact test on these; the interval is Bonett and Price's adjusted Wald for paired proportions (2012).
    """
    from scipy.stats import norm

    if n == 0:
        return Change(math.nan, None, None)
    down, up = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    width = float(norm.ppf(1 - ALPHA / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    interval = (max(-1.0, up - down - width), min(1.0, up - down + width))
    # Rows that are all equal leave nothing to test, and no family to be corrected for.
    return Change((won - lost) / n, interval, mcnemar(lost, won))


def paired_means(before: Floats, after: Floats) -> Change:
    """Difference of two means of the same rows: Student's t interval and test of the rows' differences."""
    from scipy.stats import t

    change = after - before
    n, value = len(change), float(change.mean()) if len(change) else math.nan
    if not change.any():
        return Change(value, (0.0, 0.0) if n else None, None)
    error = float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if n < LEAST_PAIRS or error == 0:
        return Change(value, None, None)
    width = float(t.ppf(1 - ALPHA / 2, n - 1)) * error
    return Change(value, (value - width, value + width), 2 * float(t.sf(abs(value) / error, n - 1)))


def unpaired_rates(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Change:
    """Difference of two rates of different rows.

    The interval is Newcombe's, of the Wilson limits of either rate (1998, method 10); the test is Fisher's exact one.
    """
    from scipy.stats import fisher_exact

    (won, n), (won_after, n_after) = ((int(each.sum()), len(each)) for each in (before, after))
    limits, limits_after = wilson(won, n), wilson(won_after, n_after)
    if limits is None or limits_after is None:
        return Change(math.nan, None, None)
    one, two = won / n, won_after / n_after
    (low, high), (low_after, high_after) = limits, limits_after
    interval = (
        two - one - math.hypot(two - low_after, high - one),
        two - one + math.hypot(high_after - two, one - low),
    )
    p = float(fisher_exact(np.array([[won, n - won], [won_after, n_after - won_after]])).pvalue)
    return Change(two - one, interval, p)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for being asked together (Holm 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    reached = 0.0
    for rank, (p, index) in enumerate(known):
        reached = max(reached, min(1.0, p * (len(known) - rank)))
        corrected[index] = reached
    return corrected
