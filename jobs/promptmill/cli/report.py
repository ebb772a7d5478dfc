"""``report``: what happened, computed from rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, open_all, print_json, stdout_console

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


@click.command(epilog="Example: promptmill report @last --json")
@click.argument("job", default="@last")
@json_option
def report(job: str, as_json: bool) -> None:
    """Report on JOB: throughput, latency, errors, consistency checks and scores, each figure from its rows."""
    from promptmill.catalog import find_job

    _, db = open_all()
    print_report(db, find_job(db, job).id, as_json)


def print_report(db: Engine, job_id: str, as_json: bool) -> None:
    """The report of a job on stdout."""
    from promptmill.reports.summary import summarise
    from promptmill.reports.terminal import render

    summary = summarise(db, job_id)
    if as_json:
        print_json(summary.to_json())
    else:
        render(summary, stdout_console())
