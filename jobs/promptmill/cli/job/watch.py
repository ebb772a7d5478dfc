"""``watch``: follow a job that workers run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from promptmill.cli.common import json_option, open_all, stderr_console
from promptmill.cli.job.ending import end

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from promptmill.core.settings import Settings
    from promptmill.service.local_run import RunOutcome

#: Seconds between two looks at a job that is followed.
FOLLOW_S = 0.5


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
