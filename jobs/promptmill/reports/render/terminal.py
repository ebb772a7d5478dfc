"""The report for people: one calm page of a terminal. Every figure has its entry in ``reports/figures/metrics.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from promptmill.database.figure_sql import PERCENTILES
from promptmill.reports.figures.checks import Check
from promptmill.reports.figures.distributions import Curve
from promptmill.reports.figures.measured import WorkerShare
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, digits
from promptmill.reports.figures.percentiles import Distribution
from promptmill.reports.figures.summary import Summary
from promptmill.reports.render.tables import MARKS, counted, excerpt, further, with_unit
from promptmill.scoring.scorers.tally import Score
from promptmill.types import JobState

#: Columns of the page: wider terminals get no wider lines, which would be harder to read.
WIDEST = 100

#: From this width on, figures stand in two columns.
TWO_COLUMNS = 84

#: Seconds from which on people think in minutes.
LONG_S = 120

#: Hexadecimal digits of a SHA-256 that are shown: enough to tell files apart.
SHA_DIGITS = 12

#: Heights of a curve, from nothing to its maximum.
BLOCKS = " ▁▂▃▄▅▆▇█"

_STATE_STYLE = {
    JobState.COMPLETED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "yellow",
    JobState.EXPIRED: "yellow",
    JobState.PAUSED: "yellow",
}


def render(summary: Summary, console: Console, wide: bool = False) -> None:
    """Print the page, at most WIDEST columns wide, or as wide as the console."""
    width = console.width if wide else min(console.width, WIDEST)
    console.print(_page(summary, width), width=width, highlight=False)


def _page(summary: Summary, width: int) -> Group:
    sections: list[RenderableType] = [_title(summary), _identity(summary)]
    sections += _section("Work", _work(summary, width))
    if summary.attempted:
        sections += _section("Time", _times(summary, width), *_precision(summary))
        sections += _section("Output over time", *_sparkline(summary.curve, width)) if summary.curve else []
    if summary.errors_by_class:
        sections += _section("Errors", _errors(summary))
    if summary.scores:
        sections += _section("Scores", _scores(summary.scores), *_confusions(summary.scores, width))
    if summary.gates:
        sections += _section(
            "Gates", *(Text(str(gate), style="" if gate.passed else "bold red") for gate in summary.gates)
        )
    if len(summary.workers) > 1 or any(_measured(each) for each in summary.workers):
        sections += _section("Workers", _workers(summary.workers))
    sections += _section("Checks", _checks(summary.checks))
    return Group(*sections, "", _verdict(summary))


def _section(title: str, *content: RenderableType) -> list[RenderableType]:
    return ["", Text(title, style="bold"), *(_indented(each) for each in content)]


def _indented(content: RenderableType) -> Padding:
    # Without expand, lines end where their text ends: pages are pasted into letters.
    return Padding(content, (0, 0, 0, 2), expand=False)


def _title(summary: Summary) -> Text:
    title = Text("Job ", style="bold").append(summary.job_id)
    if summary.name:
        title.append(f"  {summary.name}")
    return title.append("  ").append(summary.state.value, style=_style(summary))


def _style(summary: Summary) -> str:
    return _STATE_STYLE.get(summary.state, "cyan")


def _identity(summary: Summary) -> Padding:
    """What was run on what: the lines that make a report worth keeping."""
    grid = _grid(2)
    grid.add_row("dataset", _named(summary.dataset_name, summary.dataset_sha256))
    grid.add_row("model", _named(summary.model, summary.model_fingerprint))
    if summary.task_name or summary.task_sha256:
        grid.add_row("task", _named(summary.task_name or "unnamed", summary.task_sha256))
    grid.add_row("config", Text(_short(summary.config_sha256)))
    grid.add_row("device", Text(summary.device_got or "unknown"))
    grid.add_row("began", Text(f"{_moment(summary.started_at)}, {summary.mode}"))
    if summary.tags:
        grid.add_row("tags", Text(", ".join(summary.tags)))
    if summary.note:
        grid.add_row("note", Text(excerpt(summary.note)))
    if summary.stop_reason:
        grid.add_row("stopped", Text(summary.stop_reason))
    return _indented(grid)


def _moment(at: float | None) -> str:
    return "not yet" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _named(name: str, sha: str | None) -> Text:
    text = Text(name)
    return text.append(f"  sha256 {_short(sha)}", style="dim") if sha else text


def _short(sha: str) -> str:
    return sha[:SHA_DIGITS]


def _grid(columns: int) -> Table:
    """Labels and values in turn."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for index in range(columns):
        grid.add_column(style="dim" if index % 2 == 0 else None, no_wrap=index % 2 == 0, overflow="fold")
    return grid


def _work(summary: Summary, width: int) -> Table:
    """Counts and rates, in one column of label and value or in two."""
    cells = [("requests", _counts(summary)), ("success", _success(summary)), *_rates(summary)]
    if width < TWO_COLUMNS:
        grid = _grid(2)
        for label, value in cells:
            grid.add_row(label, value)
        return grid
    grid = _grid(4)
    half = (len(cells) + 1) // 2
    for index in range(half):
        right = cells[half + index] if half + index < len(cells) else ("", Text())
        grid.add_row(*cells[index], *right)
    return grid


def _counts(summary: Summary) -> Text:
    text = Text(f"{summary.ok:,} ok")
    text.append(f", {summary.errors:,} errors", style="red" if summary.errors else "")
    text.append(f" of {summary.rows:,}")
    return text if summary.complete else text.append(f"  {summary.completeness}", style="yellow")


def _success(summary: Summary) -> Text:
    text = Text(with_unit("success_rate", summary.success_rate))
    return text.append(f"  95 % CI {_interval(summary.success_ci95)}", style="dim") if summary.success_ci95 else text


def _rates(summary: Summary) -> list[tuple[str, Text]]:
    """Label and value of each figure of the job as a whole."""
    active = f"{METRICS['mean_active'].text(summary.mean_active)} of {_number(summary.slots)} slots"
    prompt = with_unit("prompt_tokens", summary.prompt_tokens)
    if summary.prompt_tokens:
        prompt += f", {with_unit('cached_share', summary.cached_share)} cached"
    output = with_unit("output_tokens", summary.output_tokens)
    if summary.ok:
        output += f", {METRICS['mean_output_tokens'].text(summary.mean_output_tokens)} an answer"
    cut = f"{summary.cut_off:,} at max_tokens"
    if summary.copied:
        cut += f", {summary.copied:,} copied"
    items = with_unit("items_per_s", summary.items_per_s)
    if summary.valid_per_s is not None:
        items += f", {METRICS['valid_per_s'].text(summary.valid_per_s)} valid"
    return [
        ("wall", Text(_wall(summary.wall_s))),
        ("throughput", Text(items)),
        ("output", Text(with_unit("output_tps", summary.output_tps))),
        ("prefill", Text(with_unit("prefill_tps", summary.prefill_tps))),
        ("prompt tokens", Text(prompt)),
        ("output tokens", Text(output)),
        ("cut off", Text(cut)),
        ("wasted", Text(with_unit("wasted_tokens", summary.wasted_tokens))),
        ("mean active", Text(active)),
        ("starved", Text(with_unit("starved_share", summary.starved_share))),
        ("batch efficiency", Text(with_unit("batch_efficiency", summary.batch_efficiency))),
    ]


def _wall(seconds: float | None) -> str:
    """Seconds, and from two minutes on also in hours and minutes."""
    text = with_unit("wall_s", seconds)
    if seconds is None or seconds < LONG_S:
        return text
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{text} ({f'{hours} h ' if hours else ''}{minutes} min{'' if hours else f' {rest} s'})"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _times(summary: Summary, width: int) -> Table:
    gap = 1 if width < TWO_COLUMNS else 2
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for name in (*PERCENTILES, "mean", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in DISTRIBUTIONS:
        table.add_row(*_time_row(METRICS[name].label, getattr(summary, name)))
    return table


def _precision(summary: Summary) -> list[Text]:
    """Said only where percentiles are not those of every value."""
    return [] if summary.latency_s.exact else [Text("percentiles within 0.01 %, the peak within a slice", style="dim")]


def _time_row(label: str, values: Distribution) -> list[Text]:
    """One distribution, in milliseconds when it is short. What ``n`` cannot tell is dimmed and says which n could."""
    scale, unit = (1000, "ms") if (values.mean or 0.0) < 1 else (1, "s")
    cells = [Text(f"{label} {unit}", style="dim")]
    for name, (_, least) in PERCENTILES.items():
        value = getattr(values, name)
        if value is None:
            cells.append(Text("–"))
        elif values.supports(name):
            cells.append(Text(digits(scale * value)))
        else:
            cells.append(Text(f"{digits(scale * value)} n<{least}", style="dim"))
    mean = Text("–" if values.mean is None else digits(scale * values.mean))
    return [*cells, mean, Text(f"{values.n:,}", style="dim")]


def _sparkline(curve: Curve, width: int) -> list[Text]:
    """Output tok/s in equal slices of the wall time, and what height and width mean."""
    values = _resampled(curve.output_tps, width - 4)
    top = max(values) or 1.0
    line = "".join(BLOCKS[round(value / top * (len(BLOCKS) - 1))] for value in values)
    seconds = curve.slice_s * len(curve.output_tps)
    return [Text(line, no_wrap=True), Text(f"0 to {digits(seconds)} s, top {digits(top)} tok/s", style="dim")]


def _resampled(values: Sequence[float], most: int) -> list[float]:
    """At most ``most`` means of equally many neighbours."""
    step = -(-len(values) // most)
    groups = [values[start : start + step] for start in range(0, len(values), step)]
    return [sum(group) / len(group) for group in groups]


def _errors(summary: Summary) -> Table:
    examples = {example.error_class: example for example in summary.error_examples}
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True, style="red")
    grid.add_column(style="dim", overflow="fold")
    for name, count in summary.errors_by_class.items():
        example = examples.get(name)
        grid.add_row(f"{count:,}", name, Text(f"row {example.row}: {excerpt(example.message)}" if example else ""))
    return grid


def _scores(scores: Mapping[str, Score]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, score in scores.items():
        metric = METRICS[score.metric]
        value = Text(f"{metric.label} {with_unit(score.metric, score.value)}", style="bold")
        if score.ci95:
            value.append(f"  95 % CI {metric.interval(score.ci95)}", style="not bold dim")
        grid.add_row(name, value)
        figures = further(score)
        if figures:
            grid.add_row("", Text(figures))
        grid.add_row("", Text(counted(score), style="dim"))
    return grid


#: Most classes of a confusion matrix on a page.
MOST_CONFUSED = 10


def _confusions(scores: Mapping[str, Score], width: int) -> list[RenderableType]:
    """Expected labels by predicted ones, where they fit onto the page."""
    found: list[RenderableType] = []
    for name, score in scores.items():
        given = sorted({label for row in score.confusion.values() for label in row})
        if 1 < len(score.confusion) <= MOST_CONFUSED and len(given) <= MOST_CONFUSED + 1:
            table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
            table.add_column(f"{name}: expected \\ answered", no_wrap=True)
            for label in given:
                table.add_column(_label(label), justify="right")
            for wanted, row in score.confusion.items():
                table.add_row(_label(wanted), *(f"{row[label]:,}" if label in row else "·" for label in given))
            found += ["", table] if _fits(table, width) else []
    return found


def _fits(table: Table, width: int) -> bool:
    return Console(width=10 * WIDEST).measure(table).maximum <= width


def _label(label: str) -> str:
    """A label as it is written, without the quotes of its JSON; what could not be read has none."""
    return escape(label.strip('"')) if label else "(unread)"


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _measured(worker: WorkerShare) -> bool:
    return worker.memory_bytes is not None or worker.device_memory_bytes is not None


def _workers(workers: Sequence[WorkerShare]) -> Table:
    """What each worker did, and the most memory it had: of the process and of the device, which are two things."""
    memory = ("memory_bytes", "device_memory_bytes") if any(map(_measured, workers)) else ()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("worker", "device got"):
        table.add_column(name, overflow="fold")
    for name in ("slots", "ok", "errors", *(f"{METRICS[each].label} {METRICS[each].shown_unit}" for each in memory)):
        table.add_column(name, justify="right")
    for worker in workers:
        numbers = (_number(worker.slots), f"{worker.ok:,}", f"{worker.errors:,}")
        sizes = (METRICS[name].text(getattr(worker, name)) for name in memory)
        table.add_row(Text(worker.id), Text(worker.device_got or "unknown"), *numbers, *sizes)
    return table


def _checks(checks: Iterable[Check]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        grid.add_row(
            Text(MARKS[check.ok], style=_CHECK_STYLE[check.ok]),
            check.name,
            Text(check.detail, style="dim" if check.ok is None else ""),
        )
    return grid


_CHECK_STYLE: dict[bool | None, str] = {True: "green", False: "red", None: "dim"}


def _verdict(summary: Summary) -> Text:
    good = summary.is_good
    return Text(summary.verdict, style=f"bold {'green' if good else _verdict_style(summary)}")


def _verdict_style(summary: Summary) -> str:
    return "red" if summary.state.is_final else "cyan"
