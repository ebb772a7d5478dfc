"""``trend``: figures over the jobs of a tag."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from promptmill.cli.common import check_outputs, force_option, json_option, open_all, stdout_console


@click.command(
    epilog="""\b
Examples:
  promptmill trend --tag nightly
  promptmill trend --tag nightly --metric output_tps,category.accuracy
  promptmill trend --tag nightly --metric latency_s.p95 --format md -o trend.md
"""
)
@click.option("--tag", required=True, help="Take the jobs with this tag ('promptmill tag' sets it).")
@click.option("--metric", default="output_tps,latency_s.p95", show_default=True, help="Figures, by commas.")
@click.option("--limit", type=click.IntRange(2, 1000), default=50, show_default=True, help="The newest so many jobs.")
@click.option("--format", "format_", type=click.Choice(["term", "md", "json", "csv"]), default="term")
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@force_option
@json_option
def trend(tag: str, metric: str, limit: int, format_: str, output: str, force: bool, as_json: bool) -> None:
    """Show how figures went over the jobs of a tag, and mark where they changed for good."""
    from promptmill.cli.look.report import write_text
    from promptmill.reports.compare.trend import COLUMNS, cells, text, trends

    check_outputs(force, output)
    _, db = open_all()
    found = trends(db, tag, [name.strip() for name in metric.split(",") if name.strip()], limit)
    chosen = "json" if as_json else format_
    if chosen != "term" or output != "-":
        write_text(text(found, "md" if chosen == "term" else chosen), output)
        return
    console = stdout_console()
    for each in found:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if index == 2 else "left", no_wrap=index < 4)
        for *plain, marks in cells(each):
            style = "red" if marks.endswith("worse") else "green" if marks.endswith("better") else "yellow"
            table.add_row(*(Text(cell) for cell in plain), Text(marks, style=style))
        console.print(Text(f"{each.tag}: {each.name}", style="bold"))
        console.print(table)
