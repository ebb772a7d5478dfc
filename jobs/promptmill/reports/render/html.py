"""The report as one HTML file: works offline, opened from a mail, printed. No script; all foreign text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.engine import Connection, Engine

from promptmill.reports.figures.aggregate import Plots
from promptmill.reports.figures.columns import Floats
from promptmill.reports.figures.figures import score_name, singles
from promptmill.reports.figures.inputs import consistent
from promptmill.reports.figures.metrics import DISTRIBUTIONS, METRICS, Metric, digits
from promptmill.reports.figures.summary import Summary, summarise_with_plots
from promptmill.reports.render import plots, tables
from promptmill.reports.render.details import Details, read_details
from promptmill.scoring.scorers.tally import Score

#: Bundled beside this file.
STYLE = Path(__file__).with_name("report.css")

#: Figures at the top of the page.
HEADLINE = ("items_per_s", "output_tps", "wall_s", "success_rate", "mean_active", "cached_share")


def text(db: Engine | Connection, job_id: str) -> str:
    """The whole file."""
    with consistent(db) as connection:
        summary, shapes = summarise_with_plots(connection, job_id)
        details = read_details(connection, job_id, summary.began_at or 0.0, summary.ended_at or 0.0)
    title = f"promptmill: {summary.name or summary.job_id}"
    sections = [
        _head(summary, details), _keys(summary), _plots(summary, details, shapes), _scores(summary, details),
        section("Time", _laid_out(tables.times(summary), "")), _errors(summary), _slow(details),
        _workers(summary, details), _checks(summary),
        _config(details), _definitions(summary, details),
    ]  # fmt: skip
    return document(title, "".join(sections))


def document(title: str, body: str) -> str:
    """A file with its own style that loads and runs nothing."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{safe(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def safe(value: object) -> str:
    """Foreign text as text."""
    return html.escape(str(value), quote=True)


def section(title: str, body: str) -> str:
    """Nothing where there is no body."""
    return f"<section><h2>{safe(title)}</h2>{body}</section>" if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    """A table of escaped cells; columns ``numbers`` are aligned to the right."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in right else ''}>{safe(cell)}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', columns)}</tr>{body}</table>" if body else ""


def _head(summary: Summary, details: Details) -> str:
    good = "good" if summary.is_good else "bad" if summary.state.is_final else ""
    began = (
        "not yet"
        if summary.started_at is None
        else f"{datetime.fromtimestamp(summary.started_at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )
    lines = [
        ("dataset", f"{summary.dataset_name}  sha256 {summary.dataset_sha256[:12]}"),
        ("model", f"{summary.model}  {(summary.model_fingerprint or '')[:12]}"),
        ("task", summary.task_name or "none"),
        ("config", summary.config_sha256[:12]),
        ("device", summary.device_got or "unknown"),
        ("began", began),
        ("tags", ", ".join(details.tags)),
        ("note", details.note or ""),
        ("rows", f"{summary.attempted:,} of {summary.rows:,}, {summary.completeness}"),
    ]
    rows = "".join(f"<tr><th>{label}</th><td>{safe(value)}</td></tr>" for label, value in lines if value)
    stop = f"<p class=bad>{safe(summary.stop_reason)}</p>" if summary.stop_reason else ""
    return (
        f"<h1>{safe(summary.name or 'Job')} <span class=dim>{safe(summary.job_id)}</span></h1>"
        f'<p class="verdict {good}">{safe(summary.verdict)}</p>{stop}<table>{rows}</table>'
    )


def _keys(summary: Summary) -> str:
    cards = []
    for name in HEADLINE:
        metric, value = METRICS[name], getattr(summary, name)
        shown = "not measured" if value is None else f"{metric.text(value)} {metric.shown_unit}"
        cards.append(
            f'<div title="{safe(metric.formula)}"><span class=dim>{safe(metric.label)}</span><b>{safe(shown)}</b></div>'
        )
    return f"<div class=keys>{''.join(cards)}</div>"


def _plots(summary: Summary, details: Details, shapes: Plots | None) -> str:
    if shapes is None:
        return section("Plots", "<p class=dim>No row has an answer: there is nothing to plot.</p>")
    shown = [
        (
            plots.latency_histogram(shapes),
            "latency_s of each answered row; the axis ends at the 99.5th percentile",
        ),
        (
            _throughput(shapes),
            "tokens of each row spread evenly: prompt from admission to the first token, output after it",
        ),
        (_occupancy(summary, shapes), "rows in a slot, against slots"),
        (_occupancy_by_worker(summary, shapes), _occupancy_caption(shapes)),
        (_queue(shapes), "rows that were enqueued and have no slot yet"),
        (plots.scatter(shapes), f"{len(shapes.scatter_tokens):,} of {shapes.rows:,} rows"),
    ]
    if details.spans:
        shown.append(
            (
                plots.timeline(details),
                "wide: chunks, green done, orange given back, red lost or failed, blue running; narrow: violet "
                "loading, grey idle, blue busy; a red mark: started anew",
            )
        )
    shown += [(svg, caption) for svg, caption in _resources(details)]
    figures = "".join(_figure(svg, caption) for svg, caption in shown if svg)
    return section("Plots", f"<div class=plots>{figures}</div>")


def _figure(svg: str, caption: str, kind: str = "") -> str:
    """A plot under its name, which is what is read out instead of it."""
    name = svg.partition('aria-label="')[2].partition('"')[0]
    return f"<figure class='{kind}'><figcaption><b>{name}</b> {safe(caption)}</figcaption>{svg}</figure>"


def _moments(shapes: Plots) -> Floats:
    at: Floats = np.arange(len(shapes.active), dtype=np.float64) * shapes.slice_s
    return at


def _throughput(shapes: Plots) -> str:
    at = _moments(shapes)
    lines = [("decode", at, shapes.output_tps, plots.BLUE), ("prefill", at, shapes.prefill_tps, plots.ORANGE)]
    return plots.over_time(lines, "Throughput over time", "tok/s")


def _occupancy(summary: Summary, shapes: Plots) -> str:
    at = _moments(shapes)
    lines = [("active", at, shapes.active, plots.BLUE)]
    if summary.slots:
        lines.append(("slots", at, np.full(len(at), float(summary.slots)), plots.GREEN))
    return plots.over_time(lines, "Active sequences against slots", "rows")


def _occupancy_by_worker(summary: Summary, shapes: Plots) -> str:
    slots = {worker.id: worker.slots for worker in summary.workers if worker.slots}
    return plots.occupancy(shapes.active_by_worker, slots, shapes.slice_s) if shapes.active_by_worker else ""


def _occupancy_caption(shapes: Plots) -> str:
    left_out = len(shapes.active_by_worker) - plots.MOST_WORKERS
    more = f"; {left_out:,} more workers are not shown" if left_out > 0 else ""
    return f"rows in a slot; the green line is all slots, their number in brackets{more}"


def _queue(shapes: Plots) -> str:
    return plots.over_time([("waiting", _moments(shapes), shapes.waiting, plots.ORANGE)], "Queue depth", "rows")


def _resources(details: Details) -> list[tuple[str, str]]:
    """CPU, memory and device of each worker, where they were sampled."""
    shown = []
    for name, label, unit, scale in (
        ("cpu_ratio", "CPU", "cores", 1.0),
        ("memory_bytes", "Memory", "MiB", 2.0**-20),
        ("device_memory_bytes", "Device memory", "MiB", 2.0**-20),
        ("device_use_ratio", "Device use", "%", 100.0),
    ):
        lines = [
            (worker[-24:], columns["at"], columns[name] * scale, colour)
            for (worker, columns), colour in zip(
                details.samples.items(), (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED), strict=False
            )
            if np.isfinite(columns[name]).sum() >= 2
        ]
        if lines:
            shown.append((plots.over_time(lines, f"{label} of workers", unit, "pre"), f"worker_samples.{name}"))
    return shown


def _scores(summary: Summary, details: Details) -> str:
    if not summary.scores:
        return ""
    figures = [
        _figure(
            plots.confusion(*_matrix(score), name),
            f"macro F1 {METRICS['macro_f1'].text(score.figures.values.get('macro_f1'))}",
            "square",
        )
        for name, score in summary.scores.items()
        if score.confusion
    ]
    if details.calibration is not None:
        name, found = details.calibration
        n, made = sum(each["n"] for each in found.bins), tables.figures_text(found)
        caption = f"{n:,.0f} answers; {made}"
        figures.append(_figure(plots.calibration(name, found.bins), caption, "square"))
    return section("Scores", _laid_out(tables.scores(summary)) + f"<div class=plots>{''.join(figures)}</div>")


def _laid_out(made: tables.Table, *columns: str) -> str:
    """A table; ``columns``: other names for its first ones."""
    names = (*columns, *made.columns[len(columns) :])
    return table(names, made.rows, range(made.numbers, len(names)))


def _errors(summary: Summary) -> str:
    made = tables.errors(summary)
    return section("Errors", table(("class", "rows", "first example"), made.rows, (1,)))


def _checks(summary: Summary) -> str:
    rows = [(mark, law, detail) for law, mark, detail in tables.checks(summary).rows]
    return section("Checks", table(("", "law", ""), rows))


def _matrix(score: Score) -> tuple[list[str], list[list[int]]]:
    """Labels, and rows by expected and given label."""
    given = {label for row in score.confusion.values() for label in row}
    labels = [*score.confusion, *sorted(given - score.confusion.keys())]
    return labels, [[score.confusion.get(one, {}).get(other, 0) for other in labels] for one in labels]


def _slow(details: Details) -> str:
    rows = [
        (each.row, each.custom_id, digits(each.latency_s), each.output_tokens, each.text[:160]) for each in details.slow
    ]
    return section("Slowest rows", table(("row", "id", "latency s", "tokens", "answer"), rows, (0, 2, 3)))


def _workers(summary: Summary, details: Details) -> str:
    memory = METRICS["memory_bytes"]
    rows = [
        (each.id, each.device_got or "unknown", each.slots or "?", f"{each.ok:,}", f"{each.errors:,}",
         "–" if each.model_load_s is None else digits(each.model_load_s), each.host_restarts or 0)
        for each in summary.workers
    ]  # fmt: skip
    used = [
        (each.worker_id, each.state, f"{each.samples:,}", memory.text(each.memory_bytes),
         memory.text(each.device_memory_bytes), "–" if each.cpu_ratio is None else digits(each.cpu_ratio),
         "–" if each.device_use_ratio is None else f"{100 * each.device_use_ratio:.0f}")
        for each in details.resources
    ]  # fmt: skip
    who = table(("worker", "device got", "slots", "ok", "errors", "model load s", "restarts"), rows, range(2, 7))
    columns = ("worker", "phase", "samples", "most memory MiB", "most device MiB", "mean CPU cores", "mean device %")
    return section("Workers", who) + section("Resources by phase", table(columns, used, range(2, 7)))


def _config(details: Details) -> str:
    pairs = [*details.config.items(), *_flat("", details.env)]
    return section("Configuration and environment", f"<div class=names>{table(('name', 'value'), pairs)}</div>")


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def _definitions(summary: Summary, details: Details) -> str:
    """The definition of every figure, and the query that gives it."""
    run = {"RUN": details.score_run} if details.score_run else {}
    job = {"JOB": summary.job_id} | run
    shown = [(metric.name, metric, "not measured" if value is None else metric.text(value), job)
             for metric, value in singles(summary)]  # fmt: skip
    shown += [(name, METRICS[name], "see above", job) for name in DISTRIBUTIONS]
    for name, score in summary.scores.items():
        figures = score.all_figures | {"majority_baseline": score.majority_baseline}
        names = {"SCORE": name} | run
        shown += [(score_name(name, each), METRICS[each], METRICS[each].text(value), names)
                  for each, value in figures.items() if value is not None]  # fmt: skip
    for worker in summary.workers:
        for metric in (METRICS["memory_bytes"], METRICS["device_memory_bytes"]):
            value = getattr(worker, metric.name)
            if value is not None:
                shown.append((f"{metric.name} of {worker.id}", metric, metric.text(value), job | {"WORKER": worker.id}))
    rows = [(name, value, metric.shown_unit, metric.formula, _query(metric, names))
            for name, metric, value, names in shown]  # fmt: skip
    columns = ("figure", "value", "unit", "definition", "promptmill query …")
    return section("Every figure, its definition and its query", f"<div class=small>{table(columns, rows, (1,))}</div>")


def _query(metric: Metric, names: Mapping[str, str]) -> str:
    """The query with what it is about in place of ``'JOB'``, ``'RUN'`` and their like."""
    quoted = {place: name.replace("'", "''") for place, name in names.items()}
    return re.sub(r"'([A-Z]+)'", lambda found: f"'{quoted.get(found[1], found[1])}'", metric.sql or "")
