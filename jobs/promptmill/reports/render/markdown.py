"""The report for pull requests: tables of GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from promptmill.reports.figures.figures import singles
from promptmill.reports.figures.metrics import Better
from promptmill.reports.figures.summary import Summary
from promptmill.reports.render import tables


def text(summary: Summary) -> str:
    """The whole page."""
    parts = [
        f"## Job {escaped(summary.name or summary.job_id)}: {escaped(summary.verdict)}",
        _identity(summary),
        table(("figure", "value", "unit"), _figures(summary)),
        laid_out(tables.times(summary)),
    ]
    if summary.errors_by_class:
        parts.append(laid_out(tables.errors(summary)))
    if summary.scores:
        parts.append(laid_out(tables.scores(summary).first(5)))
    parts.append(laid_out(tables.checks(summary)))
    return "\n\n".join(parts) + "\n"


def escaped(value: object) -> str:
    """``value`` as text of one cell: no markup of its own, no line breaks."""
    text = " ".join(str(value).split())
    for mark in ("\\", "|", "`", "*", "_", "[", "]"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of escaped cells; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def laid_out(made: tables.Table) -> str:
    return table(made.columns, made.rows)


def _identity(summary: Summary) -> str:
    known = [
        ("job", summary.job_id),
        ("dataset", f"{summary.dataset_name} (sha256 {summary.dataset_sha256[:12]})"),
        ("model", summary.model),
        ("task", summary.task_name),
        ("config", summary.config_sha256[:12]),
        ("device", summary.device_got),
    ]
    return "\n".join(f"- {label}: {escaped(value)}" for label, value in known if value)


def _figures(summary: Summary) -> list[tuple[str, str, str]]:
    rows = [("completeness", summary.completeness, "")]
    for metric, value in singles(summary):
        if metric.better is not Better.NEITHER or value:
            rows.append((metric.name, metric.text(value), metric.shown_unit))
    return rows
