"""The report for pull requests: tables of GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.figures import singles
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, Better, digits
from promptmill.reports.figures.summary import Summary


def text(summary: Summary) -> str:
    """The whole page."""
    parts = [
        f"## Job {escaped(summary.name or summary.job_id)}: {escaped(summary.verdict)}",
        _identity(summary),
        table(("figure", "value", "unit"), _figures(summary)),
        table(("time", *PERCENTILES, "mean", "n"), _times(summary)),
    ]
    if summary.errors_by_class:
        parts.append(table(("error", "rows", "example"), _errors(summary)))
    if summary.scores:
        parts.append(table(("score", "value", "95 % CI", "n", "unparsed"), _scores(summary)))
    parts.append(table(("check", "", "detail"), [(each.name, _MARKS[each.ok], each.detail) for each in summary.checks]))
    return "\n\n".join(parts) + "\n"


_MARKS = {True: "✓", False: "✗", None: "·"}


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


def _times(summary: Summary) -> list[tuple[str, ...]]:
    rows = []
    for name in DISTRIBUTIONS:
        values = getattr(summary, name)
        cells = [_percentile(values, point) for point in PERCENTILES]
        mean = "–" if values.mean is None else digits(values.mean)
        rows.append((f"{METRICS[name].label} s", *cells, mean, f"{values.n:,}"))
    return rows


def _percentile(values: object, point: str) -> str:
    value = getattr(values, point)
    if value is None:
        return "–"
    return digits(value) if values.supports(point) else f"{digits(value)} (n<{PERCENTILES[point][1]})"  # type: ignore[attr-defined]


def _errors(summary: Summary) -> list[tuple[str, str, str]]:
    examples = {each.error_class: each for each in summary.error_examples}
    rows = []
    for name, count in summary.errors_by_class.items():
        example = examples.get(name)
        rows.append((name, f"{count:,}", f"row {example.row}: {example.message[:160]}" if example else ""))
    return rows


def _scores(summary: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, score in summary.scores.items():
        metric = METRICS[score.metric]
        value = metric.shown(score.value)
        rows.append(
            (f"{name} {metric.label}", value, metric.interval(score.ci95), f"{score.n:,}", f"{score.unparsed:,}")
        )
        for figure, each in score.figures.values.items():
            made = METRICS[figure]
            interval = made.interval(score.figures.intervals.get(figure))
            rows.append((f"{name} {made.label}", made.shown(each), interval, f"{score.n:,}", ""))
    return rows
