"""The same rows twice: how much a figure changed, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from promptmill.scoring.statistics.clusters import Clusters, Floats, Interval, Ints, Truths, drawn
from promptmill.scoring.statistics.ranking import auc, influence

#: Fewest clusters whose differences tell a mean.
LEAST_CLUSTERS = 6

#: Largest number of signs whose sums are counted one by one; of more, their normal approximation serves.
MOST_SIGNS = 4000


@dataclass(frozen=True, slots=True)
class Change:
    """A change with its test. ``p`` and ``interval(level)`` are None where there is nothing to tell it by."""

    value: float
    p: float | None = None
    within: Callable[[float], Interval] | None = None

    def interval(self, level: float = 0.95) -> Interval | None:
        return None if self.within is None else self.within(level)

    def scaled(self, factor: float) -> Change:
        """The same in another unit; ``factor`` is above 0."""
        within = self.within
        if within is None:
            return Change(self.value * factor, self.p)

        def scaled(level: float) -> Interval:
            low, high = within(level)
            return low * factor, high * factor

        return Change(self.value * factor, self.p, scaled)


#: The change of rows that are all equal: nothing is left to test, and no family to be corrected for.
UNCHANGED = Change(0.0, None, lambda level: (0.0, 0.0))


def flips(before: Floats, after: Floats) -> tuple[Ints, Ints]:
    """Places of the rows that only the first has right, and of those that only the second has. NaN is not counted."""
    both = np.isfinite(before) & np.isfinite(after)
    lost, won = both & (before == 1) & (after != 1), both & (before != 1) & (after == 1)
    return np.flatnonzero(lost), np.flatnonzero(won)


def signs(changes: Floats) -> float | None:
    """The p-value of the exact test whether each cluster's change could as well have had the other sign.

    ``changes``: whole numbers. Where each is -1, 0 or 1 this is McNemar's exact test. None of no change.
    """
    sizes = np.abs(changes[changes != 0]).astype(np.int64)
    if not len(sizes):
        return None
    reached, total = int(abs(changes.sum())), int(sizes.sum())
    if len(sizes) > MOST_SIGNS or total > MOST_SIGNS:
        # With a correction for continuity: the sums lie two apart.
        distance = max(0.0, reached - 1) / float((sizes.astype(np.float64) ** 2).sum()) ** 0.5
        return min(1.0, 2 * NormalDist().cdf(-distance))
    if len(np.unique(sizes)) == 1:
        from scipy.stats import binomtest

        return float(binomtest((len(sizes) + reached // int(sizes[0])) // 2, len(sizes), 0.5).pvalue)
    shares = np.zeros(total + 1)
    shares[0] = 1.0
    # Sums of the sizes that have a plus: each size is in it or not.
    for size in sizes.tolist():
        moved = np.concatenate([np.zeros(size), shares[:-size]])
        shares = (shares + moved) / 2
    return float(min(1.0, shares[np.abs(2 * np.arange(total + 1) - total) >= reached].sum()))


def rates(before: Truths, after: Truths, clusters: Clusters) -> Change:
    """Difference of two rates of the same rows: the test of :func:`signs`.

    The interval is Bonett and Price's adjusted Wald for paired proportions (2012), of as many rows as the variance
    between clusters leaves.
    """
    n = len(before)
    if not n:
        return Change(math.nan)
    if (before == after).all():
        return UNCHANGED
    change = after.astype(np.float64) - before.astype(np.float64)
    value, moved = float(change.mean()), float((change != 0).mean())
    sums = clusters.sums(change)
    own = float(((sums - value * clusters.sizes) ** 2).sum()) / n**2
    alone = (moved - value**2) / n
    evidence = float((sums != 0).sum())
    ratio = (evidence * own / alone + 2 * clusters.copies) / (evidence + 2) if alone > 1e-15 else clusters.copies
    rows = n if clusters.count == n else n / max(ratio, 1.0)

    def within(level: float) -> Interval:
        down, up = (((moved - sign * value) / 2 * rows + 1) / (rows + 2) for sign in (1, -1))
        width = _quantile(clusters.effective, level) * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
        return max(-1.0, up - down - width), min(1.0, up - down + width)

    return Change(value, signs(sums), within)


def means(before: Floats, after: Floats, clusters: Clusters) -> Change:
    """Difference of two means of the same rows: Student's t of the differences between clusters."""
    change = after - before
    value = float(change.mean()) if len(change) else math.nan
    if len(change) and not change.any():
        return UNCHANGED
    if clusters.count < LEAST_CLUSTERS:
        return Change(value)
    if (change == change[0]).all():
        # Without a spread there is no t; by chance as many signs are the same this often.
        return Change(value, 0.5 ** (clusters.count - 1), lambda level: (value, value))
    off = clusters.sums(change) - value * clusters.sizes
    error = float((off**2).sum() * clusters.count / (clusters.count - 1)) ** 0.5 / len(change)
    return by_error(value, error, clusters.effective)


def by_error(value: float, error: float, independent: float) -> Change:
    """A change with a standard error that so many independent observations tell: Student's t."""
    if not error > 0:
        return Change(value)
    from scipy.special import stdtr

    p = 2 * float(stdtr(max(1.0, independent - 1), -abs(value) / error))

    def within(level: float) -> Interval:
        width = _quantile(independent, level) * error
        return value - width, value + width

    return Change(value, p, within)


def figures(
    before: Ints, after: Ints, cells: int, clusters: Clusters, of: Callable[[Floats], Mapping[str, Floats]]
) -> dict[str, Change]:
    """Changes of figures of counts, by a bootstrap of clusters that both sides share.

    ``before`` and ``after``: the cell that each row counts in, from 0. ``of`` gives each figure for counts of shape
    (drawings, cells).
    """
    few = clusters.few()
    tables = [few.table(each, cells) for each in (before, after)]
    one, two = (of(each.sum(axis=0, keepdims=True)) for each in tables)

    def changes(counts: Floats) -> dict[str, Floats]:
        before_them, after_them = of(counts[:, :cells]), of(counts[:, cells:])
        return {name: after_them[name] - before_them[name] for name in before_them}

    spreads = drawn(np.concatenate(tables, axis=1), changes)
    found = {}
    for name in one:
        value = float(two[name][0] - one[name][0])
        spread = float(np.std(spreads[name], ddof=1))
        if (before == after).all():
            found[name] = UNCHANGED
        else:
            found[name] = by_error(value, spread, few.effective) if clusters.count >= LEAST_CLUSTERS else Change(value)
    return found


def areas(before: Floats, after: Floats, truth: Truths, clusters: Clusters) -> Change:
    """Change of an AUC over the same rows: DeLong's covariance (1988), between clusters (Obuchowski 1997)."""
    value = auc(after, truth) - auc(before, truth)
    off = influence(after, truth) - influence(before, truth)
    if not off.any():
        return UNCHANGED
    small = min(clusters.at(truth).count, clusters.at(~truth).count)
    if small < 2 or clusters.count < LEAST_CLUSTERS:
        return Change(value)
    error = float((clusters.sums(off) ** 2).sum() * small / (small - 1)) ** 0.5
    return by_error(value, error, min(clusters.at(truth).effective, clusters.at(~truth).effective))


def _quantile(independent: float, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(max(1.0, independent - 1), (1 + level) / 2))
