"""The report as CSV: one figure a line, unrounded, with its unit and its definition."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from promptmill.reports.figures.figures import metric_of, names_of, value_of
from promptmill.reports.figures.summary import Summary
from promptmill.store.spreadsheets import inert

COLUMNS = ("job_id", "completeness", "figure", "value", "unit", "kind", "better", "formula")


def text(summary: Summary) -> str:
    """All lines, with a header. What was not measured is empty; shares are between 0 and 1."""
    return lines(COLUMNS, (_line(summary, name) for name in names_of(summary)))


def _line(summary: Summary, name: str) -> tuple[str, ...]:
    metric, value = metric_of(name), value_of(summary, name)
    unit = "share" if metric.unit == "%" else metric.unit.value
    shown = "" if value is None else repr(value)
    about = (metric.kind.value, metric.better.value, metric.formula)
    return summary.job_id, summary.completeness, name, shown, unit, *about


def lines(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a header, of which no cell is a formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(map(inert, rows))
    return stream.getvalue()
