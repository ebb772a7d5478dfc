"""The tables of reports and comparisons: what every form prints, which only lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.compare.comparison import Comparison, Flips, Line, shown_change, shown_interval
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, digits
from promptmill.reports.figures.percentiles import Distribution
from promptmill.reports.figures.summary import Summary
from promptmill.scoring.scorers.aggregates import Figures
from promptmill.scoring.scorers.tally import Score

#: Most of an error's message that is shown.
MESSAGE_CHARACTERS = 160

#: Marks of a check that holds, that does not, and that could not be made.
MARKS = {True: "✓", False: "✗", None: "·"}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are read; the columns from ``numbers`` on are numbers."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: int = 1

    def first(self, count: int) -> Table:
        """The first columns only, for narrow forms."""
        return Table(self.columns[:count], [row[:count] for row in self.rows], self.numbers)


# --- a report --------------------------------------------------------------------------------------------------------


def times(summary: Summary) -> Table:
    """A row for each distribution, in seconds; what ``n`` cannot tell says which n could."""
    rows = []
    for name in DISTRIBUTIONS:
        values: Distribution = getattr(summary, name)
        mean = "–" if values.mean is None else digits(values.mean)
        cells = (_percentile(values, point) for point in PERCENTILES)
        rows.append((f"{METRICS[name].label} s", *cells, mean, f"{values.n:,}"))
    return Table(("time", *PERCENTILES, "mean", "n"), rows)


def _percentile(values: Distribution, point: str) -> str:
    value = getattr(values, point)
    if value is None:
        return "–"
    return digits(value) if values.supports(point) else f"{digits(value)} (n<{PERCENTILES[point][1]})"


def errors(summary: Summary) -> Table:
    """A row for each class of errors, with the first one of it."""
    examples = {each.error_class: each for each in summary.error_examples}
    rows = []
    for name, count in summary.errors_by_class.items():
        example = examples.get(name)
        rows.append(
            (name, f"{count:,}", f"row {example.row}: {example.message[:MESSAGE_CHARACTERS]}" if example else "")
        )
    return Table(("error", "rows", "example"), rows)


def scores(summary: Summary) -> Table:
    """A row for each figure of each score."""
    rows: list[tuple[str, ...]] = []
    for name, score in summary.scores.items():
        metric = METRICS[score.metric]
        rows.append((
            f"{name} {metric.label}", metric.shown(score.value), metric.interval(score.ci95), _rows(score),
            f"{score.unparsed:,}", f"{score.truncated:,}", METRICS["majority_baseline"].shown(score.majority_baseline),
        ))  # fmt: skip
        for figure, each in score.figures.values.items():
            made = METRICS[figure]
            interval = made.interval(score.figures.intervals.get(figure))
            rows.append((f"{name} {made.label}", made.shown(each), interval, _rows(score), "", "", ""))
    return Table(("score", "value", "95 % CI", "n", "unparsed", "truncated", "majority"), rows)


def _rows(score: Score) -> str:
    """How many rows there are, and as how many different ones they tell where some are copies."""
    return f"{score.n:,} (as {score.n_effective:,.0f})" if score.has_copies else f"{score.n:,}"


def checks(summary: Summary) -> Table:
    return Table(("check", "", "detail"), [(each.name, MARKS[each.ok], each.detail) for each in summary.checks])


def with_unit(name: str, value: float | None) -> str:
    metric = METRICS[name]
    text = metric.text(value)
    return "not measured" if value is None else f"{text} {metric.shown_unit}"


def excerpt(message: str) -> str:
    """The beginning of a message, on one line."""
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"


def further(score: Score) -> str:
    """The further figures of a score."""
    return figures_text(score.figures)


def figures_text(figures: Figures) -> str:
    """Figures in a line, with the interval of each that has one."""
    parts = []
    for name, value in figures.values.items():
        metric, interval = METRICS[name], figures.intervals.get(name)
        parts.append(f"{metric.label} {metric.shown(value)}" + (f" {metric.interval(interval)}" if interval else ""))
    return ", ".join(parts)


def counted(score: Score) -> str:
    """What a score's value rests on."""
    is_rate = score.metric == "accuracy"
    parts = [
        f"{score.correct:,} of {score.n:,} right" if is_rate else f"mean of {score.n:,}",
        *([f"which tell as much as {score.n_effective:,.0f} different ones"] if score.has_copies else []),
        f"{score.unparsed:,} unparsed",
        f"{score.truncated:,} truncated",
    ]
    if score.abstain:
        parts.append(f"{score.abstain:,} abstained")
    if score.infra_error:
        parts.append(f"{score.infra_error:,} without an answer")
    if score.unlabelled:
        parts.append(f"{score.unlabelled:,} unlabelled")
    if score.left_out:
        parts.append(f"{score.left_out:,} left out")
    if score.scorer_errors:
        parts.append(f"{score.scorer_errors:,} the scorer failed on ({score.scorer_error})")
    if score.note:
        parts.append(score.note)
    if score.n and is_rate and score.majority is not None:
        parts.append(f"majority {with_unit('majority_baseline', score.majority_baseline)}")
    return ", ".join(parts)


# --- a comparison ----------------------------------------------------------------------------------------------------


def changes(found: Comparison) -> Table:
    """A row for each figure of both jobs."""
    return Table(("figure", "A", "B", "change", "interval", ""), [_change(line) for line in found.lines])


def _change(line: Line) -> tuple[str, ...]:
    unit = f" {line.metric.shown_unit}"
    one, two = (f"{line.metric.text(each)}{unit if each is not None else ''}" for each in (line.before, line.after))
    words = ", ".join(each for each in (line.word, line.note) if each)
    shown = "–" if line.note.startswith("not comparable") else shown_change(line)
    return line.name, one, two, shown, shown_interval(line), words


def differences(found: Comparison) -> Table:
    """A row for each setting in which the jobs differ."""
    return Table(("configuration", "A", "B"), [(name, _short(a), _short(b)) for name, a, b in found.differences])


def _short(value: object) -> str:
    """A value of a configuration on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 48 else text[:12] + "…"


def flipped(flips: Flips) -> str:
    """How many rows flipped, in a sentence."""
    return f"{flips.name}: {flips.lost:,} right in A only, {flips.won:,} right in B only{_p(flips)}"


def flipped_rows(flips: Flips) -> list[tuple[str, str]]:
    """The ids of either kind, where there are any."""
    kinds = (("A only", flips.lost_keys), ("B only", flips.won_keys))
    return [(label, ", ".join(keys)) for label, keys in kinds if keys]


def _p(flips: Flips) -> str:
    return "" if flips.p is None else f" (McNemar p = {flips.p:.3g})"
