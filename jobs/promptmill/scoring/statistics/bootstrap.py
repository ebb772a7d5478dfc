"""Intervals of figures of counts, such as F1 or kappa, by drawing clusters of rows with replacement."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from promptmill.scoring.statistics.clusters import DRAWS, SEED, Clusters, Floats, Interval, Ints, drawn


def intervals(
    cell: Ints, cells: int, clusters: Clusters, of: Callable[[Floats], Mapping[str, Floats]], level: float = 0.95
) -> dict[str, Interval]:
    """The percentile interval of each figure that ``of`` gives for counts of shape (drawings, cells).

    ``cell``: the cell that each row counts in, from 0; cells without a row are what might have been seen. Where no
    drawing changes a figure, as in a perfect run, one row more is assumed, somewhere among the unseen cells: of a rate
    this is the rule of three (Hanley and Lippman-Hand 1983), near enough.
    """
    few = clusters.few()
    table = few.table(cell, cells)
    counts = table.sum(axis=0)
    point = of(counts[None])
    found, still = {}, []
    for name, values in drawn(table, of).items():
        low, high = _within(values, level)
        if low < high:
            found[name] = (low, high)
        else:
            still.append(name)
    if not still or not (counts == 0).any():
        return found
    unseen = np.where(counts == 0, 1.0 / (counts == 0).sum(), counts / clusters.copies)
    shares = np.random.default_rng(SEED).dirichlet(unseen, DRAWS) * counts.sum()
    assumed = of(shares)
    for name in still:
        low, high = _within(assumed[name], level)
        found[name] = (min(low, float(point[name][0])), max(high, float(point[name][0])))
    return found


def _within(values: Floats, level: float) -> Interval:
    low, high = np.percentile(values, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)
