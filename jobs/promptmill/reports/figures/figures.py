"""The figures of a summary as a list: what every tabular form of a report prints, in one order."""

from __future__ import annotations

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, SINGLE, Metric
from promptmill.reports.figures.summary import Summary


def singles(summary: Summary) -> list[tuple[Metric, float | None]]:
    """Each figure of the whole job; None was not measured."""
    return [(METRICS[name], getattr(summary, name)) for name in SINGLE]


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
