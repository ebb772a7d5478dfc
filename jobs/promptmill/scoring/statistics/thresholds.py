"""The threshold that suits a probability best, chosen on one half of the rows and measured on the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from promptmill.scoring.statistics.clusters import SEED, Clusters, Floats, Ints, Truths

#: Most thresholds that are tried: quantiles of the confidences of the first half.
MOST_TRIED = 200

#: Fewest rows of either class in either half.
LEAST = 5


@dataclass(frozen=True, slots=True)
class Threshold:
    """``value``: yes from this probability on. The rest is of the rows on which it was not chosen."""

    value: float
    #: 0 right, 1 missed, 2 false, 3 rightly no.
    kinds: Ints
    clusters: Clusters


def best_threshold(
    confidence: Floats, truth: Truths, clusters: Clusters, costs: tuple[float, float] | None
) -> Threshold | None:
    """The threshold with the best F1 or, with ``costs`` of a false yes and of a missed one, the least cost.

    Halves are drawn by clusters. None where a half has fewer than LEAST rows of a class.
    """
    first = (np.random.default_rng(SEED).permutation(clusters.count) < clusters.count // 2)[clusters.index]
    counts = [int((side & half).sum()) for side in (truth, ~truth) for half in (first, ~first)]
    if min(counts) < LEAST:
        return None
    known, wanted = confidence[first], truth[first]
    tried = np.unique(np.quantile(known, np.linspace(0, 1, MOST_TRIED), method="higher"))
    worth = np.array([_worth(_kinds(known >= each, wanted), costs) for each in tried])
    # The one in the middle of equally good ones is the least of an accident.
    best = np.flatnonzero(worth == worth.max())
    value = float(tried[best[len(best) // 2]])
    return Threshold(value, _kinds(confidence[~first] >= value, truth[~first]), clusters.at(~first))


def _kinds(given: Truths, wanted: Truths) -> Ints:
    return np.where(wanted, np.where(given, 0, 1), np.where(given, 2, 3))


def _worth(kinds: Ints, costs: tuple[float, float] | None) -> float:
    right, missed, false = (int((kinds == kind).sum()) for kind in range(3))
    if costs is not None:
        return -(costs[0] * false + costs[1] * missed)
    return 2 * right / max(1, 2 * right + missed + false)
