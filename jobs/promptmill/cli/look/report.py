"""``report``: what happened, computed from rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from promptmill.cli.common import (
    check_outputs,
    force_option,
    json_option,
    open_all,
    print_json,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.reports.figures.summary import Summary

FORMATS = ("term", "html", "json", "md", "csv")


@click.command(
    epilog="""\b
Examples:
  promptmill report @last
  promptmill report @last -o report.html
  promptmill report nightly --format md
"""
)
@click.argument("job", default="@last")
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    help="Form of the report.  [default: by the name of -o, else term]",
)
@click.option("-o", "--output", type=click.Path(), default="-", help="Write here; - is stdout.  [default: -]")
@click.option("--wide", is_flag=True, help="As wide as the terminal, not at most 100 columns.")
@force_option
@json_option
def report(job: str, format_: str | None, output: str, wide: bool, force: bool, as_json: bool) -> None:
    """Report on JOB: throughput, latency, errors, consistency checks and scores, each figure from its rows."""
    from promptmill.reports.figures.summary import summarise
    from promptmill.store.catalog import find_job

    chosen = "json" if as_json else format_ or by_name(output)
    check_outputs(force, output)
    _, db = open_all()
    job_id = find_job(db, job).id
    if chosen == "term" and output == "-":
        print_report(summarise(db, job_id), False, wide)
    else:
        write_text(_text(db, job_id, chosen), output)


def by_name(output: str) -> str:
    """The form that the name of a file asks for."""
    suffix = Path(output).suffix.lstrip(".").lower()
    return {"htm": "html", "markdown": "md"}.get(suffix, suffix if suffix in FORMATS else "term")


def _text(db: Engine, job_id: str, format_: str) -> str:
    """The report of a job as the text of a file."""
    from promptmill.core.registry import resolve
    from promptmill.reports import TEXTS
    from promptmill.reports.figures.summary import summarise

    if format_ == "html":
        from promptmill.reports.render.html import text as page

        return page(db, job_id)
    summary = summarise(db, job_id)
    if format_ == "term":
        return _page(summary)
    made: Callable[[Summary], str] = resolve("report", format_, TEXTS)
    return made(summary)


def _page(summary: Summary) -> str:
    import io

    from rich.console import Console

    from promptmill.reports.render.terminal import WIDEST, render

    stream = io.StringIO()
    render(summary, Console(file=stream, width=WIDEST, highlight=False))
    return stream.getvalue()


def write_text(text: str, output: str) -> None:
    """To stdout, or to a file that appears whole."""
    from promptmill.core.outputs import is_stdout, writing

    with writing(output) as stream:
        stream.write(text)
    if not is_stdout(output):
        stderr_console().print(f"wrote {output}", soft_wrap=True)


def print_report(summary: Summary, as_json: bool, wide: bool = False) -> None:
    """A report on stdout."""
    from promptmill.reports.render.terminal import render

    if as_json:
        print_json(summary.to_json())
    else:
        render(summary, stdout_console(), wide)
