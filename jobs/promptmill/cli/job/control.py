"""``cancel``, ``pause``, ``retry`` and ``reconcile``: what one does to jobs that are there."""

from __future__ import annotations

import click

from promptmill.cli.common import json_option, open_all, print_json
from promptmill.core.terminal import say


@click.command(epilog="Example: promptmill cancel @last")
@click.argument("job")
@json_option
def cancel(job: str, as_json: bool) -> None:
    """End JOB: nothing more of it is started, and what runs is dropped. Results it has stay."""
    from promptmill.service import service

    settings, db = open_all()
    job_id, changed = service.cancel(job, settings, db)
    if as_json:
        print_json({"job_id": job_id, "cancelled": changed})
    else:
        say(f"job {job_id} is cancelled" if changed else f"job {job_id} had ended already")


@click.command(epilog="Example: promptmill pause @last")
@click.argument("job")
@json_option
def pause(job: str, as_json: bool) -> None:
    """Start nothing more of JOB until 'promptmill resume'; requests that run may end."""
    from promptmill.service import service

    settings, db = open_all()
    job_id, changed = service.pause(job, settings, db)
    if as_json:
        print_json({"job_id": job_id, "paused": changed})
    else:
        say(f"job {job_id} is paused" if changed else f"job {job_id} was paused already")


@click.command(epilog="Example: promptmill retry @last --class timeout")
@click.argument("job")
@click.option("--class", "error_class", help="Only errors of this class, such as timeout.")
@click.option("--device", default="auto", show_default=True, help="Where an embedded job runs.")
@json_option
def retry(job: str, error_class: str | None, device: str, as_json: bool) -> None:
    """Run the errors of JOB, which has ended, again. Answers stay; the errors are kept in the table 'retries'."""
    from promptmill.cli.job.ending import end, forget_texts
    from promptmill.cli.job.messages import show_warning
    from promptmill.cli.progress import ProgressView
    from promptmill.service import service

    settings, db = open_all()
    with ProgressView() as view:
        rows, outcome = service.retry(job, error_class, settings, db, device, view.update, show_warning)
    if rows == 0 and as_json:
        print_json({"job_id": outcome.job_id, "rows": 0, "state": outcome.state.value})
    elif rows == 0:
        what = f"errors of class {error_class}" if error_class else "errors"
        say(f"job {outcome.job_id} has no {what} to run again")
    elif outcome.state.is_final:
        try:
            end(outcome, db, as_json, as_json)
        finally:
            forget_texts(db, outcome)
    elif as_json:
        print_json({"job_id": outcome.job_id, "rows": rows, "state": outcome.state.value})
    else:
        say(f"{rows:,} rows of job {outcome.job_id} are run again; promptmill watch {outcome.job_id}")


@click.command(epilog="Example: promptmill reconcile")
@json_option
def reconcile(as_json: bool) -> None:
    """Take back chunks whose worker is gone, and publish those whose message is. Workers do so by themselves."""
    from promptmill.service import service

    settings, db = open_all()
    taken_back, published = service.reconcile(settings, db)
    if as_json:
        print_json({"taken_back": taken_back, "published": published})
    else:
        say(f"{taken_back:,} chunks taken back, {published:,} published")
