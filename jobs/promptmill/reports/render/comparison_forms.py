"""A comparison as a page of the terminal, as Markdown, as JSON and as CSV."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptmill.reports.compare.comparison import Comparison
from promptmill.reports.render import markdown, tables
from promptmill.reports.render.csv import lines
from promptmill.reports.render.json import dumped
from promptmill.reports.render.tables import flipped, flipped_rows

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
        for name, one, two in tables.differences(found).rows:
            console.print(Text(f"  {name}: {one} -> {two}"), width=width)
    made = tables.changes(found)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(made.columns):
        # Names are copied into conditions: they are broken on narrow terminals only.
        side: Literal["left", "right"] = "left" if index in (0, 5) else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=index == 0 and width >= NARROW)
    for line, (*plain, word) in zip(found.lines, made.rows, strict=True):
        table.add_row(*plain, Text(word, style=_STYLES.get(line.word, "dim")))
    console.print(Text("\nFigures", style="bold"))
    console.print(table, width=width)
    for flips in found.flips:
        console.print(Text(f"\n{flipped(flips)}"))
        for label, keys in flipped_rows(flips):
            console.print(Text(f"  {label}: {keys}", style="dim"), width=width)
    for warning in found.warnings:
        console.print(Text(f"note: {warning}", style="yellow"), width=width)
    console.print(Text(f"\n{found.verdict}", style="bold"), width=width)


def text(found: Comparison, format_: str) -> str:
    """The comparison as ``md``, ``json`` or ``csv``."""
    return {"md": _markdown, "json": _json, "csv": _csv}[format_](found)


def _json(found: Comparison) -> str:
    return dumped(found.to_json())


def _markdown(found: Comparison) -> str:
    names = [f"{each.name or each.job_id}" for each in (found.after, found.before)]
    parts = [f"## {markdown.escaped(names[0])} against {markdown.escaped(names[1])}: {markdown.escaped(found.verdict)}"]
    parts.append(markdown.laid_out(tables.changes(found)))
    if found.differences:
        parts.append(markdown.laid_out(tables.differences(found)))
    for flips in found.flips:
        rows = [f"- {label}: {markdown.escaped(keys)}" for label, keys in flipped_rows(flips)]
        parts.append("\n".join([markdown.escaped(flipped(flips)), *([""] if rows else []), *rows]))
    parts += [f"- {markdown.escaped(each)}" for each in found.warnings]
    return "\n\n".join(parts) + "\n"


def _csv(found: Comparison) -> str:
    names = ("name", "unit", "before", "after", "change", "p_holm", "word", "note")
    jobs = (found.before.job_id, found.after.job_id)
    each = (line.to_json() for line in found.lines)
    return lines(("before_job", "after_job", *names), ((*jobs, *(line[name] for name in names)) for line in each))
