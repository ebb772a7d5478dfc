"""The figures of a summary as a list: what every tabular form of a report prints, in one order."""

from __future__ import annotations

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.metrics import METRICS, Metric
from promptmill.reports.figures.summary import Summary

#: Figures of the job as a whole that are printed, in order.
SINGLE = (
    "rows", "attempted", "ok", "errors", "cancelled", "cut_off", "copied", "success_rate", "wall_s", "items_per_s",
    "valid_per_s", "output_tps", "total_tps", "prefill_tps", "decode_tps", "prompt_tokens", "cached_tokens",
    "output_tokens", "reasoning_tokens", "wasted_tokens", "cached_share", "mean_output_tokens", "mean_active",
    "peak_active", "slots", "batch_efficiency", "starved_share", "idle_share",
)  # fmt: skip

#: Figures with a value for each row.
DISTRIBUTIONS = ("latency_s", "ttft_s", "tpot_s", "queue_s")


def singles(summary: Summary) -> list[tuple[Metric, float | None]]:
    """Each figure of the whole job; None was not measured."""
    return [(METRICS[name], getattr(summary, name)) for name in SINGLE]


def percentiles(summary: Summary) -> list[tuple[Metric, str, float | None, bool]]:
    """Metric, percentile, value, and whether the number of values can tell it."""
    return [
        (METRICS[name], point, getattr(getattr(summary, name), point), getattr(summary, name).supports(point))
        for name in DISTRIBUTIONS
        for point in PERCENTILES
    ]


def score_name(name: str, metric: str) -> str:
    """The name of a score as conditions and trends give it: ``category.accuracy``."""
    return f"{name}.{metric}"


def value_of(summary: Summary, name: str) -> float | None:
    """One figure by its name: ``output_tps``, ``latency_s.p95``, ``category.accuracy``. Raises KeyError for no such."""
    if name in SINGLE:
        return _number(getattr(summary, name))
    stem, _, part = name.rpartition(".")
    if stem in DISTRIBUTIONS and part in (*PERCENTILES, "mean"):
        return _number(getattr(getattr(summary, stem), part))
    for field, score in summary.scores.items():
        for figure, value in score.all_figures.items():
            if name == score_name(field, figure):
                return value
    raise KeyError(name)


def names_of(summary: Summary) -> list[str]:
    """Every name that :func:`value_of` knows."""
    points = [f"{name}.{part}" for name in DISTRIBUTIONS for part in (*PERCENTILES, "mean")]
    return [*SINGLE, *points, *_score_names(summary)]


def _score_names(summary: Summary) -> list[str]:
    return [score_name(name, figure) for name, score in summary.scores.items() for figure in score.all_figures]


def metric_of(name: str) -> Metric:
    """The definition behind a name of :func:`value_of`."""
    stem, _, part = name.rpartition(".")
    return METRICS.get(name) or METRICS.get(stem) or METRICS[part]


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
