"""The report as CSV: one figure a line, unrounded, with its unit and its definition."""

from __future__ import annotations

import csv
import io

from promptmill.reports.figures.figures import metric_of, names_of, value_of
from promptmill.reports.figures.summary import Summary
from promptmill.store.spreadsheets import inert

COLUMNS = ("job_id", "completeness", "figure", "value", "unit", "kind", "better", "formula")


def text(summary: Summary) -> str:
    """All lines, with a header. What was not measured is empty; shares are between 0 and 1."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name in names_of(summary):
        metric, value = metric_of(name), value_of(summary, name)
        unit = "share" if metric.unit == "%" else metric.unit.value
        shown = "" if value is None else repr(value)
        about = (metric.kind.value, metric.better.value, metric.formula)
        writer.writerow(inert([summary.job_id, summary.completeness, name, shown, unit, *about]))
    return stream.getvalue()
