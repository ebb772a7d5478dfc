"""Intervals of rates."""

from __future__ import annotations


def wilson(successes: int, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson interval of the rate ``successes / n``; None of nothing."""
    if n == 0:
        return None
    # SciPy's statistics take more than a second to import: only reports with a rate pay.
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
