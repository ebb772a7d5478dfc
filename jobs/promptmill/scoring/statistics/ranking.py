"""The area under the ROC curve: how often a row that is a yes ranks above one that is a no."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from promptmill.scoring.statistics.clusters import Clusters, Floats, Interval, Truths

#: Rows of the rarer class whose worth the assumed variance has. With 15, intervals cover at 6 yes of 300 as at 100 of
#: 300 (tests/benchmarks/simulations.py).
ASSUMED = 15.0

#: Points of the line from 0 to 1 at which the interval is tried.
STEPS = 4000


def auc(confidence: Floats, truth: Truths) -> float:
    """The Mann-Whitney estimate. Needs a yes and a no; equal confidences are half a win."""
    return float(_wins(confidence, truth)[truth].mean())


def _wins(confidence: Floats, truth: Truths) -> Floats:
    """The share, for each row, of the rows of the other kind that it is rightly ranked against (Sun and Xu 2014)."""
    from scipy.stats import rankdata

    yes, no = confidence[truth], confidence[~truth]
    ranks = rankdata(np.concatenate([yes, no]))
    found = np.empty(len(confidence))
    found[truth] = (ranks[: len(yes)] - rankdata(yes)) / len(no)
    found[~truth] = 1 - (ranks[len(yes) :] - rankdata(no)) / len(yes)
    return found


def influence(confidence: Floats, truth: Truths) -> Floats:
    """What each row adds to the AUC's distance from its mean; their sum over drawn rows varies as the AUC does."""
    wins = _wins(confidence, truth)
    mean = float(wins[truth].mean())
    found: Floats = np.where(truth, (wins - mean) / max(truth.sum(), 1), (wins - mean) / max((~truth).sum(), 1))
    return found


def variance(confidence: Floats, truth: Truths, clusters: Clusters) -> float:
    """DeLong's (1988), between clusters (Obuchowski 1997). Needs two clusters that hold a yes, and two with a no."""
    off = influence(confidence, truth)
    if clusters.count == len(truth):
        parts = (off[truth], off[~truth])
        return float(sum((part**2).sum() * len(part) / (len(part) - 1) for part in parts))
    with_yes, with_no = (clusters.at(each).count for each in (truth, ~truth))
    small = min(with_yes, with_no)
    return float((clusters.sums(off) ** 2).sum()) * small / (small - 1)


def auc_interval(confidence: Floats, truth: Truths, clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Values that the AUC found is not too far from, by the variance that they would have themselves.

    Newcombe's method 5 (2006), whose variance (Hanley and McNeil 1982) is scaled to DeLong's the more, the more rows
    the rarer class has. None of fewer than two clusters of a class.
    """
    yes, no = clusters.at(truth).effective, clusters.at(~truth).effective
    if min(clusters.at(truth).count, clusters.at(~truth).count) < 2:
        return None
    found = auc(confidence, truth)
    inside = 1 / (2 * yes * no)
    own = variance(confidence, truth, clusters) / _assumed(np.array([np.clip(found, inside, 1 - inside)]), yes, no)[0]
    rows = min(yes, no) - 1
    scale = (rows * own + ASSUMED * max(1.0, own)) / (rows + ASSUMED)
    points = np.arange(1, STEPS) / STEPS
    reach = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(scale * _assumed(points, yes, no))
    near = points[np.abs(found - points) <= reach]
    low, high = (float(near[0]), float(near[-1])) if len(near) else (found, found)
    return (0.0 if low <= points[0] else min(low, found)), (1.0 if high >= points[-1] else max(high, found))


def _assumed(area: Floats, yes: float, no: float) -> Floats:
    """Newcombe's variance of an AUC of ``area`` with so many of either class."""
    half = (yes + no) / 2 - 1
    return area * (1 - area) * (1 + half * (1 - area) / (2 - area) + half * area / (1 + area)) / (yes * no)
