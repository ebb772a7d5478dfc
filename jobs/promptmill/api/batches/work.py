"""What of a batch evaluates a client's texts: functions for a child with limits, and what is bounded in time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from promptmill.api.batches.validation import QUESTIONS
from promptmill.api.jobs import creation
from promptmill.api.jobs.creation import Whose
from promptmill.core.settings import Settings
from promptmill.database.engine import reading
from promptmill.database.revision import opened
from promptmill.database.tables import batches, jobs, requests, results
from promptmill.errors import DatabaseError, first_line
from promptmill.scoring.runs import keep_scores
from promptmill.service.job_options import JobOptions
from promptmill.store import catalog
from promptmill.store.catalog import FETCH_ROWS
from promptmill.store.result_lines import openai_line
from promptmill.tasks.task_file import parse_task
from promptmill.tasks.tools import Offer, ToolCall, read_calls

#: Seconds of computing in which the calls of a batch are read; what is left then is shown as the text that it is.
READ_CALLS_S = 60.0

#: For rows that were never answered: code and message, by how the batch ended.
UNANSWERED = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled."),
    "completed": ("batch_failed", "This request was not executed: the model could not answer."),
}


def store(settings: Settings, options: JobOptions, path: str, task_text: str | None, whose: Whose) -> str:
    """Store the job of a batch; returns its id."""
    task = parse_task(task_text, options.name or "task") if task_text else None
    with _passing(), opened(settings.database_url) as db:
        return creation.store(settings, db, options, path, task, whose)


def score(settings: Settings, job_id: str) -> None:
    """Keep the scores of an ended job. Raises TaskFileError for a task whose scores cannot be computed."""
    with _passing(), opened(settings.database_url) as db:
        keep_scores(db, catalog.find_job(db, job_id))


@contextlib.contextmanager
def _passing() -> Iterator[None]:
    """A database that is away is told in an error that reaches the parent."""
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as problem:
        raise DatabaseError(first_line(problem)) from None


def write(settings: Settings, batch_id: str, end: str, paths: tuple[str, str], read_calls_s: float) -> None:
    """The lines of a batch that ended so: those that were answered to the first file, the others to the second."""
    with (
        _passing(),
        opened(settings.database_url) as db,
        reading(db) as connection,
        open(paths[0], "wb") as output,
        open(paths[1], "wb") as errors,
    ):
        batch = connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()
        for line in _lines(connection, batch, end, Reading(read_calls_s)):
            response = line["response"]
            is_ok = response is not None and response["status_code"] == 200
            (output if is_ok else errors).write(orjson.dumps(line) + b"\n")
        connection.rollback()


def _lines(db: Connection, batch: Row[Any], end: str, reading_calls: Reading) -> Iterator[dict[str, Any]]:
    query = (
        sa.select(results, requests.c.custom_id, requests.c.input, requests.c.sampling, requests.c.row.label("number"))
        .select_from(requests)
        .outerjoin(results, sa.and_(requests.c.job_id == results.c.job_id, requests.c.row == results.c.row))
        .where(requests.c.job_id == batch.job_id)
        .order_by(requests.c.row)
    )
    code, message = UNANSWERED[end]
    text = db.execute(sa.select(jobs.c.sampling).where(jobs.c.id == batch.job_id)).scalar()
    common = json.loads(text or "{}")
    for row in db.execution_options(yield_per=FETCH_ROWS).execute(query):
        if row.state is None:
            yield {
                "id": f"batch_req_{batch.job_id}-{row.number}", "custom_id": row.custom_id, "response": None,
                "error": {"code": code, "message": message},
            }  # fmt: skip
        else:
            yield openai_line(row, batch.model or "", common, QUESTIONS[batch.endpoint], reading_calls.read)


class Reading:
    """Reads the calls of a batch's answers, by schemas of a client's, while there is time."""

    def __init__(self, seconds: float = READ_CALLS_S) -> None:
        self._left_s = seconds

    def read(self, text: str, offer: Offer) -> tuple[str, list[ToolCall]]:
        if self._left_s <= 0 and offer.is_strict:
            return text, []
        started = time.thread_time()
        try:
            return read_calls(text, offer)
        finally:
            self._left_s -= time.thread_time() - started
