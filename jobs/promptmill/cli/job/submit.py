"""``submit``: jobs for the workers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from promptmill.cli.common import OptionsCommand, check_outputs, open_all, print_json
from promptmill.cli.job.run import job_inputs, job_options, options_of, repeated_runs
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.service.job_options import JobOptions


@click.command(
    cls=OptionsCommand,
    epilog="""\b
Examples:
  promptmill submit prompts.jsonl --model demo --priority 2
  promptmill submit prompts.jsonl --model demo --wait -o results.jsonl
""",
)
@job_options
@click.option("--priority", type=click.IntRange(0, 9), default=5, show_default=True, help="0 is the most urgent.")
@click.option("--expires", help="Give the job up if it has not begun by then: a span or a time.")
@click.option("--wait", is_flag=True, help="Follow the job to its end and print its report.")
@click.option("-o", "--output", type=click.Path(), help="With --wait: write the results here.")
def submit(wait: bool, output: str | None, force: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Send DATASET to the workers, through Redis. Everything is checked before anything is stored."""
    from promptmill.cli.job.control import follow
    from promptmill.cli.job.ending import end
    from promptmill.cli.job.messages import report_dry_run, show_preflight, show_warning
    from promptmill.cli.look.results import write_results
    from promptmill.core.outputs import discard, is_stdout
    from promptmill.service import service

    if output and not wait:
        raise click.UsageError("-o needs --wait: there are no results yet. Use 'promptmill results JOB -o FILE' later.")
    options = options_of(values)
    if dry_run:
        report_dry_run(options, "queue", as_json)
        return
    check_outputs(force, output, values["junit"], inputs=job_inputs(values))
    discard(values["junit"])
    settings, db = open_all()

    def send(options: JobOptions) -> str:
        return service.submit(options, settings, db, show_preflight, show_warning)

    asks = values["if_exists"] is None and sys.stdin.isatty() and sys.stderr.isatty() and values["repeat_runs"] == 1
    with repeated_runs(options, values["repeat_runs"]) as runs:
        ids = [_ask_and_send(each, send) if asks else send(each) for each in runs]
    if not wait:
        for job_id in ids:
            _say_submitted(db, job_id, as_json)
        return
    for job_id in ids:
        outcome = follow(settings, db, job_id)
    if output:
        write_results(db, job_id, output)
    quiet = as_json or (output is not None and is_stdout(output))
    end(outcome, db, quiet, as_json, junit=values["junit"])


def _ask_and_send(options: JobOptions, send: Callable[[JobOptions], str]) -> str:
    """Submit; where a job asks the same, ask the person at the terminal what to do."""
    from promptmill.errors import JobExists

    try:
        return send(options.changed(if_exists="fail"))
    except JobExists as twin:
        question = f"{twin.message}. Run it all again (new), take that one (attach), or leave it (fail)"
        wish = click.prompt(question, type=click.Choice(["new", "attach", "fail"]), default="new", err=True)
        if wish == "fail":
            raise
    return send(options.changed(if_exists=wish))


def _say_submitted(db: Engine, job_id: str, as_json: bool) -> None:
    from promptmill.queue.dispatcher import waits_for
    from promptmill.store.catalog import find_job

    job = find_job(db, job_id)
    state = job.state
    if as_json:
        print_json({"job_id": job_id, "state": state, "waits_for": waits_for(db, job)})
    elif state == "paused":
        say(f"job {job_id} is paused; go on with: promptmill resume {job_id}")
    elif state == "completed":
        say(f"job {job_id} is completed; see: promptmill report {job_id}")
    else:
        say(f"job {job_id} submitted; follow it with: promptmill watch {job_id}")
