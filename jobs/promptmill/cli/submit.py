"""``submit``: jobs for the workers."""

from __future__ import annotations

from typing import Any

import click

from promptmill.cli.common import job_options, open_all, print_json, run_options


@click.command(
    epilog="""\b
Examples:
  promptmill submit prompts.jsonl --model demo --priority 2
  promptmill submit prompts.jsonl --model demo --wait -o results.jsonl
"""
)
@job_options
@click.option("--priority", type=click.IntRange(0, 9), default=5, show_default=True, help="0 is the most urgent.")
@click.option("--expires", help="Give the job up if it has not begun by then: a span or a time.")
@click.option("--wait", is_flag=True, help="Follow the job to its end and print its report.")
@click.option("-o", "--output", type=click.Path(), help="With --wait: write the results here.")
def submit(wait: bool, output: str | None, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Send DATASET to the workers, through Redis. Everything is checked before anything is stored."""
    from promptmill import service
    from promptmill.cli.inspect import follow
    from promptmill.cli.results import check_output, write_results
    from promptmill.cli.run import end, report_dry_run, show_preflight, show_warning

    if output and not wait:
        raise click.UsageError("-o needs --wait: there are no results yet. Use 'promptmill results JOB -o FILE' later.")
    options = run_options(values)
    if dry_run:
        report_dry_run(options, "queue", as_json)
        return
    if output:
        check_output(output)
    settings, db = open_all()
    job_id = service.submit(options, settings, db, show_preflight, show_warning)
    if not wait:
        if as_json:
            print_json({"job_id": job_id, "state": "queued"})
        else:
            click.echo(f"job {job_id} submitted; follow it with: promptmill watch {job_id}")
        return
    outcome = follow(settings, db, job_id)
    if output:
        write_results(db, job_id, output)
    end(outcome, db, as_json or output == "-", as_json, junit=values["junit"])
