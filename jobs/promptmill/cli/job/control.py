"""``cancel``, ``pause``, ``retry``, ``reconcile`` and ``watch``: what one does with jobs that are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, open_all, print_json, stderr_console
from promptmill.cli.job.ending import end, forget_texts
from promptmill.core.terminal import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.core.settings import Settings
    from promptmill.service.local_run import RunOutcome

#: Seconds between two looks at a job that is followed.
FOLLOW_S = 0.5


@click.command(epilog="Example: promptmill cancel @last")
@click.argument("job")
@json_option
def cancel(job: str, as_json: bool) -> None:
    """End JOB: nothing more of it is started, and what runs is dropped. Results it has stay."""
    from promptmill.service import service

    _change(job, service.cancel, "cancelled", "had ended already", as_json)


@click.command(epilog="Example: promptmill pause @last")
@click.argument("job")
@json_option
def pause(job: str, as_json: bool) -> None:
    """Start nothing more of JOB until 'promptmill resume'; requests that run may end."""
    from promptmill.service import service

    _change(job, service.pause, "paused", "was paused already", as_json)


def _change(job: str, change: Callable[..., tuple[str, bool]], done: str, otherwise: str, as_json: bool) -> None:
    settings, db = open_all()
    job_id, changed = change(job, settings, db)
    if as_json:
        print_json({"job_id": job_id, done: changed})
    else:
        say(f"job {job_id} is {done}" if changed else f"job {job_id} {otherwise}")


@click.command(epilog="Example: promptmill retry @last --class timeout")
@click.argument("job")
@click.option("--class", "error_class", help="Only errors of this class, such as timeout.")
@click.option("--device", default="auto", show_default=True, help="Where an embedded job runs.")
@json_option
def retry(job: str, error_class: str | None, device: str, as_json: bool) -> None:
    """Run the errors of JOB, which has ended, again. Answers stay; the errors are kept in the table 'retries'."""
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


@click.command(epilog="Example: promptmill watch @last")
@click.argument("job", default="@last")
@json_option
def watch(job: str, as_json: bool) -> None:
    """Follow JOB to its end, then print its report. Ctrl-C stops the watching, not the job."""
    from promptmill.store.catalog import find_job

    settings, db = open_all()
    outcome = follow(settings, db, find_job(db, job).id)
    end(outcome, db, as_json, as_json)


def follow(settings: Settings, db: Engine, job_id: str) -> RunOutcome:
    """Show the job's progress until it has ended."""
    from promptmill.cli.progress import ProgressView
    from promptmill.service.local_run import RunOutcome, ledger_of
    from promptmill.types import JobState

    ledger = ledger_of(db, settings)
    patience = _Patience(db, job_id)
    with ProgressView() as view:
        while True:
            progress = ledger.progress(job_id)
            view.update(progress)
            if progress.state.is_final or progress.state is JobState.PAUSED:
                return RunOutcome(job_id, progress.state, finished=progress.state.is_final)
            patience.check(progress.done)
            time.sleep(FOLLOW_S)


class _Patience:
    """Says that nothing happens because no worker serves the job's model: at once, and whenever that becomes so."""

    #: Seconds without a new result before it looks again.
    AGAIN_S = 10.0

    def __init__(self, db: Engine, job_id: str) -> None:
        self._db = db
        self._job_id = job_id
        self._done = -1
        self._look_at = time.monotonic()
        self._said: str | None = None

    def check(self, done: int) -> None:
        from promptmill.queue.dispatcher import waits_for
        from promptmill.store.catalog import find_job

        now = time.monotonic()
        if done != self._done and self._done >= 0:
            self._look_at = now + self.AGAIN_S
        self._done = done
        if now < self._look_at:
            return
        self._look_at = now + self.AGAIN_S
        waits = waits_for(self._db, find_job(self._db, self._job_id))
        if waits and waits != self._said:
            stderr_console().print(waits, soft_wrap=True)
        self._said = waits
