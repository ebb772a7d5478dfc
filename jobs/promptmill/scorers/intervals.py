"""Intervals of rates and means."""

from __future__ import annotations


def mean_interval(total: float, squares: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval of Student's t of a mean of values from 0 to 1; None of fewer than two, and of equal ones.

    ``total`` and ``squares`` are the sums of the ``n`` values and of their squares.
    """
    if n < 2:
        return None
    from scipy.stats import t

    mean = total / n
    # Equal values say nothing of how far the next one may be: no interval rather than one without width.
    deviation = (max(0.0, squares - n * mean * mean) / (n - 1)) ** 0.5
    if deviation == 0.0:
        return None
    half = float(t.ppf(0.975, n - 1)) * deviation / n**0.5
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson(successes: int, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson interval of the rate ``successes / n``; None of nothing."""
    if n == 0:
        return None
    # SciPy's statistics take more than a second to import: only reports with a rate pay.
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
