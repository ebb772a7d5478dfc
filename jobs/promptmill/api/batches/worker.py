"""Moves batches along: validates, submits, waits for the job, writes the files. A process of its own.

What it does, it can do again: it may be killed anywhere, and another one goes on. Several servers may run one each;
a batch belongs to one of them for as long as it is renewed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from promptmill.api.batches import work
from promptmill.api.batches.leases import AT_ONCE, BatchLeases
from promptmill.api.batches.passing import PASSING
from promptmill.api.batches.records import move
from promptmill.api.batches.scoring import ScoreKeeper
from promptmill.api.batches.validation import validate
from promptmill.api.http.evaluation import for_report
from promptmill.api.jobs.creation import limits_for
from promptmill.api.keys import LOCAL
from promptmill.api.openai.file_store import FileStore, usable
from promptmill.api.openai.model_directory import ModelDirectory
from promptmill.core import child_processes, programs
from promptmill.core.settings import Settings, load_settings
from promptmill.core.spans import Moment
from promptmill.core.terminal import for_people
from promptmill.database.engine import reading, writing
from promptmill.database.revision import open_database
from promptmill.database.tables import api_keys, batches, files, jobs
from promptmill.errors import BrokerError, DatabaseError, PromptmillError, first_line
from promptmill.ledger import Ledger
from promptmill.ledger.status import counts_of
from promptmill.queue.broker import Broker
from promptmill.queue.dispatcher import Dispatcher
from promptmill.queue.housekeeping import Housekeeping
from promptmill.service.job_options import JobOptions
from promptmill.types import JobState

log = logging.getLogger("promptmill.api.batches.batches")

#: Seconds between looks at the open batches, at windows that closed, and between sweeps of expired files.
TICK_S = 0.25
EXPIRE_S = 5.0
SWEEP_S = 600.0

#: Seconds that the files of a batch may take beside those for its rows, as rows.
WRITE_ROWS = 60_000

#: What a client is told of a batch that met a bug of ours.
BROKEN = "The server had an error while it worked on this batch; its log says more."

#: How the job of a batch ended -> what the batch is then. A job that could not go on at all fails its batch.
ENDS = {
    JobState.COMPLETED: "completed", JobState.FAILED: "completed", JobState.CANCELLED: "cancelled",
    JobState.EXPIRED: "expired",
}  # fmt: skip


class BatchWorker:
    """One server's batches."""

    def __init__(self, settings: Settings, db: Engine) -> None:
        self.settings = settings
        self.db = db
        self.ledger = Ledger(db, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        self.store = FileStore(settings, db)
        self.models = ModelDirectory(db)
        self.dispatcher = Dispatcher(self.ledger, Broker(settings.redis_url))
        self.claims = BatchLeases(db)
        self.house = Housekeeping(db, settings.samples_days, scoring=False)
        self.scores = ScoreKeeper(settings, db)

    def run(self, stopping: threading.Event) -> None:
        """Look after batches until told to stop."""
        swept = expired = float("-inf")
        threading.Thread(target=self._keep_house, args=(stopping,), daemon=True).start()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while not stopping.wait(TICK_S):
                try:
                    if time.monotonic() - expired > EXPIRE_S:
                        # Workers do so too; a batch expires without one.
                        self.ledger.expire_overdue()
                        self.scores.step()
                        expired = time.monotonic()
                    for batch_id in self.claims.due():
                        threads.submit(self._keep, batch_id)
                    if time.monotonic() - swept > SWEEP_S:
                        # A folder that cannot be read now is looked at again in the next round.
                        swept = time.monotonic()
                        self.store.sweep()
                except (PromptmillError, sa.exc.SQLAlchemyError, OSError) as problem:
                    log.warning("batches wait: %s", first_line(problem))
                    stopping.wait(1.0)
        self.scores.close()

    def _keep_house(self, stopping: threading.Event) -> None:
        """In a thread of its own: large jobs that lose their texts hold no batch up."""
        while not stopping.wait(EXPIRE_S):
            try:
                self.house.step()
            except PASSING as problem:
                log.warning("old rows stay for now: %s", first_line(problem))
            except Exception:
                log.exception("old rows could not be removed")

    def _keep(self, batch_id: str) -> None:
        try:
            with self.claims.renewing(batch_id):
                batch = self._read(batch_id)
                step = {"validating": self._start, "in_progress": self._close, "finalizing": self._finalise}
                step.get(batch.state, self._end_cancelled)(batch)
        except PASSING as problem:
            self._put_off(batch_id, str(problem))
        except Exception:
            log.exception("batch %s cannot go on", batch_id)
            self._give_up(batch_id)
        else:
            self.claims.done(batch_id)

    def _put_off(self, batch_id: str, why: str) -> None:
        wait_s = float("nan")
        with contextlib.suppress(*PASSING):
            wait_s = self.claims.put_off(batch_id)
        log.warning("batch %s waits %g s: %s", batch_id, wait_s, why.splitlines()[0][:200] if why else "no reason")

    def _give_up(self, batch_id: str) -> None:
        """End a batch that would fail in the same way for ever, and the job that it may have."""
        try:
            batch = self._read(batch_id)
            job_id = batch.job_id or self._job_of(batch)
            if job_id is not None:
                self.ledger.cancel(job_id)
            self._fail(batch, [{"code": "server_error", "line": None, "message": BROKEN, "param": None}])
        except Exception as problem:
            self._put_off(batch_id, str(problem))
        else:
            self.claims.done(batch_id)

    def _read(self, batch_id: str) -> Row[Any]:
        with reading(self.db) as connection:
            return connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()

    # --- validating --------------------------------------------------------------------------------------------------

    def _start(self, batch: Row[Any]) -> None:
        """Validate the file and make the job; the file's error list otherwise."""
        file = self._input(batch)
        if file is None:
            message = f"Cannot find file {batch.input_file_id}, or organization does not have access to it."
            self._fail(batch, [{"code": "invalid_request", "line": None, "message": message, "param": "file_id"}])
            return
        self.models.refresh()
        try:
            findings = child_processes.call(
                limits_for(file.bytes), validate, str(self.store.path(file.id)), batch.endpoint, self.models.names()
            )
            if findings.errors:
                self._fail(batch, findings.errors)
                return
            assert findings.model is not None
            job_id = self._job_of(batch) or self._submit(batch, file, findings.model)
        except (BrokerError, DatabaseError):
            raise
        except PromptmillError as problem:
            over_limit = isinstance(problem, child_processes.OverLimit)
            message = f"The file was not read: {problem.message}." if over_limit else problem.message
            error = {"code": "invalid_request", "line": None, "message": message[:1000], "param": None}
            self._fail(batch, [error])
            return
        with writing(self.db) as connection:
            moved = move(
                connection, batch.id, ("validating",), "in_progress", job_id=job_id, model=findings.model,
                total=findings.lines,
            )  # fmt: skip
            if not moved:
                # It was cancelled meanwhile: its end is that of its job.
                connection.execute(
                    sa.update(batches)
                    .where(batches.c.id == batch.id, batches.c.state == "cancelling", batches.c.job_id.is_(None))
                    .values(job_id=job_id, model=findings.model, total=findings.lines)
                )
        if not moved:
            if self._read(batch.id).job_id != job_id:
                # Another server took it over, and has made a job of its own.
                self.ledger.cancel(job_id)
            return
        with contextlib.suppress(BrokerError):
            # Without Redis the job waits: any worker publishes it later.
            self.dispatcher.dispatch(job_id, self.models.resolve(findings.model) or findings.model, batch.priority)

    def _input(self, batch: Row[Any]) -> Row[Any] | None:
        mine = files.c.api_key_id.is_not_distinct_from(batch.api_key_id)
        if batch.api_key_id is None or self._is_admin(batch.api_key_id):
            mine = LOCAL.owned(files.c.api_key_id)
        with reading(self.db) as connection:
            return connection.execute(
                sa.select(files).where(files.c.id == batch.input_file_id, mine, usable())
            ).one_or_none()

    def _is_admin(self, key_id: str) -> bool:
        with reading(self.db) as connection:
            scopes = connection.execute(sa.select(api_keys.c.scopes).where(api_keys.c.id == key_id)).scalar()
        return "admin" in (scopes or "").split(",")

    def _job_of(self, batch: Row[Any]) -> str | None:
        """The job of a batch whose keeper died before it wrote it down."""
        with reading(self.db) as connection:
            found: str | None = connection.execute(
                sa.select(jobs.c.id).where(
                    jobs.c.name == batch.id, jobs.c.api_key_id.is_not_distinct_from(batch.api_key_id)
                )
            ).scalar()
        return found

    def _submit(self, batch: Row[Any], file: Row[Any], model: str) -> str:
        options = JobOptions(
            dataset=file.name, format="openai_batch", model=self.models.resolve(model) or model, name=batch.id,
            priority=batch.priority, deadline=Moment(batch.expires_at), max_errors="100%", skip_invalid=True,
        )  # fmt: skip
        whose = batch.api_key_id, self._limits(batch.api_key_id)
        path = str(self.store.path(file.id))
        return child_processes.call(
            limits_for(file.bytes), work.store, self.settings, options, path, batch.task_text, whose
        )

    def _limits(self, key_id: str | None) -> int | None:
        if key_id is None:
            return None
        with reading(self.db) as connection:
            own = connection.execute(sa.select(api_keys.c.queued_requests).where(api_keys.c.id == key_id)).scalar()
        return own or self.settings.api_queued_requests

    def _fail(self, batch: Row[Any], errors: list[dict[str, Any]]) -> None:
        with writing(self.db) as connection:
            text = json.dumps(errors, ensure_ascii=False)
            if not move(connection, batch.id, ("validating", "in_progress", "finalizing"), "failed", errors=text):
                move(connection, batch.id, ("cancelling",), "cancelled", errors=text)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _close(self, batch: Row[Any]) -> None:
        """Its job has ended: write the files."""
        with writing(self.db) as connection:
            move(connection, batch.id, ("in_progress",), "finalizing")
        self._finalise(self._read(batch.id))

    def _end_cancelled(self, batch: Row[Any]) -> None:
        if batch.job_id is None and (job_id := self._job_of(batch)):
            with writing(self.db) as connection:
                connection.execute(sa.update(batches).where(batches.c.id == batch.id).values(job_id=job_id))
            batch = self._read(batch.id)
        if batch.job_id is not None:
            self.ledger.cancel(batch.job_id)
        self._finalise(batch)

    def _finalise(self, batch: Row[Any]) -> None:
        end = self._end_of(batch)
        written = self._write(batch, end) if batch.job_id is not None else {}
        with writing(self.db) as connection:
            if batch.job_id is not None:
                completed, failed = counts_of(connection, batch.job_id)
                written |= {"completed": completed, "failed": failed}
            move(connection, batch.id, ("finalizing", "cancelling"), end, **written)

    def _end_of(self, batch: Row[Any]) -> str:
        if batch.job_id is None or batch.cancelling_at is not None:
            return "cancelled"
        with reading(self.db) as connection:
            state = connection.execute(sa.select(jobs.c.state).where(jobs.c.id == batch.job_id)).scalar()
        return ENDS.get(JobState(state), "completed") if state else "cancelled"

    def _write(self, batch: Row[Any], end: str) -> dict[str, Any]:
        """The output and the error file, each only if it has a line; all rows together in both."""
        with self.store.draft() as output, self.store.draft() as errors:
            self._write_lines(batch, end, (str(output.path), str(errors.path)))
            output.look()
            errors.look()
            suffix = batch.id.removeprefix("batch_")
            kept: dict[str, Any] = {}
            for draft, column, mark in ((output, "output_file_id", "o"), (errors, "error_file_id", "e")):
                if draft.bytes:
                    # The same name again when this is done again.
                    row = self.store.store(
                        draft, f"{batch.id}_{column.partition('_')[0]}.jsonl", "batch_output", batch.api_key_id,
                        batch.output_expires_after_s, f"file-{suffix}{mark}",
                    )  # fmt: skip
                    kept[column] = row.id
        return kept

    def _write_lines(self, batch: Row[Any], end: str, paths: tuple[str, str]) -> None:
        limits = for_report(batch.total + WRITE_ROWS)
        try:
            child_processes.call(limits, work.write, self.settings, batch.id, end, paths, work.READ_CALLS_S)
        except child_processes.OverLimit:
            # Calls by schemas that need too much are shown as the text that they are.
            child_processes.call(limits, work.write, self.settings, batch.id, end, paths, 0.0)


def main() -> None:
    """Entry point of the process: until its parent is gone."""
    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level,
        format="%(asctime)s %(levelname)s [batches] %(message)s",
        stream=for_people(sys.stderr),
    )
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        # What it is in the middle of, the next one does again.
        threading.Timer(5.0, os._exit, (0,)).start()

    programs.read_order()
    programs.when_parent_ends(stop)
    BatchWorker(settings, open_database(settings.database_url)).run(stopping)


if __name__ == "__main__":
    main()
