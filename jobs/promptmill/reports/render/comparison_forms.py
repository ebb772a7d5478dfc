"""A comparison as a page of the terminal, as Markdown, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptmill.reports.compare.comparison import Comparison, Flips, Line, shown_change
from promptmill.reports.render import markdown
from promptmill.store.spreadsheets import inert

COLUMNS = ("figure", "A", "B", "change", "95 % CI", "")

#: Columns of a terminal from which on names of figures are kept whole.
NARROW = 90

_STYLES = {"better": "green", "worse": "red"}


def render(found: Comparison, console: Console) -> None:
    """Print the page, at most 100 columns wide."""
    width = min(console.width, 100)
    for label, summary in (("A", found.before), ("B", found.after)):
        console.print(Text(f"{label}  {summary.job_id}  {summary.name or ''}  {summary.model}"), width=width)
    runs = "" if max(found.runs) == 1 else f", {found.runs[0]} and {found.runs[1]} runs"
    console.print(Text(f"{found.common:,} common rows{runs}", style="dim"))
    if found.differences:
        console.print(Text("\nConfiguration", style="bold"))
        for name, one, two in found.differences:
            console.print(Text(f"  {name}: {short(one)} -> {short(two)}"), width=width)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(COLUMNS):
        # Names are copied into conditions: they are broken on narrow terminals only.
        side: Literal["left", "right"] = "left" if index in (0, 5) else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=index == 0 and width >= NARROW)
    for line in found.lines:
        *plain, word = cells(line)
        table.add_row(*plain, Text(word, style=_STYLES.get(line.word, "dim")))
    console.print(Text("\nFigures", style="bold"))
    console.print(table, width=width)
    for flips in found.flips:
        console.print(Text(f"\n{_flipped(flips)}"))
        for label, keys in _flipped_rows(flips):
            console.print(Text(f"  {label}: {keys}", style="dim"), width=width)
    for warning in found.warnings:
        console.print(Text(f"note: {warning}", style="yellow"), width=width)
    console.print(Text(f"\n{found.verdict}", style="bold"), width=width)


def short(value: object) -> str:
    """A value of a configuration on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 48 else text[:12] + "…"


def cells(line: Line) -> tuple[str, ...]:
    """A line under COLUMNS."""
    unit = f" {line.metric.shown_unit}"
    one, two = (f"{line.metric.text(each)}{unit if each is not None else ''}" for each in (line.before, line.after))
    interval = "–" if line.ci95 is None else "[{:+.1f}, {:+.1f}]".format(*(100 * each for each in line.ci95))
    words = ", ".join(each for each in (line.word, line.note) if each)
    shown = "–" if line.note.startswith("not comparable") else shown_change(line)
    return line.name, one, two, shown, interval, words


def _flipped(flips: Flips) -> str:
    return f"{flips.name}: {flips.lost:,} right in A only, {flips.won:,} right in B only{_p(flips)}"


def _flipped_rows(flips: Flips) -> list[tuple[str, str]]:
    """The ids of either kind, where there are any."""
    kinds = (("A only", flips.lost_keys), ("B only", flips.won_keys))
    return [(label, ", ".join(keys)) for label, keys in kinds if keys]


def _p(flips: Flips) -> str:
    return "" if flips.p is None else f" (McNemar p = {flips.p:.3g})"


def text(found: Comparison, format_: str) -> str:
    """The comparison as ``md``, ``json`` or ``csv``."""
    return {"md": _markdown, "json": _json, "csv": _csv}[format_](found)


def _json(found: Comparison) -> str:
    return json.dumps(found.to_json(), ensure_ascii=False, indent=2) + "\n"


def _markdown(found: Comparison) -> str:
    names = [f"{each.name or each.job_id}" for each in (found.after, found.before)]
    parts = [f"## {markdown.escaped(names[0])} against {markdown.escaped(names[1])}: {markdown.escaped(found.verdict)}"]
    parts.append(markdown.table(COLUMNS, [cells(line) for line in found.lines]))
    if found.differences:
        shown = [(name, short(one), short(two)) for name, one, two in found.differences]
        parts.append(markdown.table(("configuration", "A", "B"), shown))
    for flips in found.flips:
        rows = [f"- {label}: {markdown.escaped(keys)}" for label, keys in _flipped_rows(flips)]
        parts.append("\n".join([markdown.escaped(_flipped(flips)), *([""] if rows else []), *rows]))
    parts += [f"- {markdown.escaped(each)}" for each in found.warnings]
    return "\n\n".join(parts) + "\n"


def _csv(found: Comparison) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names: Sequence[str] = (
        "before_job",
        "after_job",
        "name",
        "unit",
        "before",
        "after",
        "change",
        "p_holm",
        "word",
        "note",
    )
    writer.writerow(names)
    for line in found.lines:
        values = line.to_json()
        writer.writerow(inert([found.before.job_id, found.after.job_id, *(values[name] for name in names[2:])]))
    return stream.getvalue()
