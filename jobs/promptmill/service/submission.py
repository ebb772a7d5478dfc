"""Dataset and task become a job, its requests and its chunks, in one transaction: all of it, or nothing."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import pickle
import platform
import socket
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from promptmill.core.spans import Moment, span_s
from promptmill.database.counting import Counts, counting
from promptmill.database.engine import copy_rows, id_at, lock_name, now_of, refresh_statistics, writing
from promptmill.database.tables import chunks, jobs, requests, results
from promptmill.errors import DatabaseError, JobExists, QueueFull
from promptmill.ledger import RESULT_COLUMNS, waiting_requests
from promptmill.service.prepare import Prepared
from promptmill.service.rows import PreparedRow, Rows
from promptmill.types import ChunkState, ErrorClass, Failed, JobState

#: Rows of one INSERT or COPY: large enough to be cheap, small enough to keep memory flat.
BATCH_ROWS = 5_000

#: Most rows of a chunk. At 16 slots it is 16 rounds; the cost of a chunk's own statements is then under 1 %.
CHUNK_ROWS = 256

#: Most expected tokens of a chunk: 10 to 60 s of a device of 1,000 to 6,000 tokens/s.
CHUNK_TOKENS = 64_000

#: The first and last chunks are smaller: results show at once, and all devices finish together.
FIRST_CHUNK_ROWS = 64
LAST_CHUNK_ROWS = 16

#: A chunk takes at most this part of the rows that are left, so that dozens of devices end within two rounds.
TAPER = 24

REQUEST_COLUMNS = (
    "job_id",
    "row",
    "custom_id",
    "input",
    "expected",
    "meta",
    "sampling",
    "input_digest",
    "prompt_digest",
)
CHUNK_COLUMNS = (
    "job_id", "number", "first_row", "rows", "state", "attempt", "published_at", "ok", "errors", "output_tokens",
)  # fmt: skip


def submit(db: Engine, prepared: Prepared) -> str:
    """Store the job and return its id.

    Raises :class:`BadLines` for lines that cannot be used (unless they are to be skipped), :class:`DatasetError` for a
    dataset without a row, :class:`JobExists` for a job that is there already (unless ``if_exists`` is 'new'), and
    :class:`JobError` for a full queue; nothing is stored then.
    """
    options, gauge, rows = prepared.options, prepared.gauge, Rows(prepared)
    with _ready(rows, prepared) as ready, writing(db) as connection:
        now = now_of(connection)
        job_id = id_at(now)
        columns = job_columns(prepared)
        ends = {"deadline_at": _at(options.deadline, now), "expires_at": _at(options.expires, now)}
        connection.execute(sa.insert(jobs).values(id=job_id, submitted_at=now, **ends, **columns))
        _store_requests(connection, job_id, ready, now, counting(connection, prepared.model))
        rows.refuse_bad()
        key = _key(prepared)
        if options.if_exists != "new":
            lock_name(connection, f"job {key}")
            if (twin := _twin(connection, key)) is not None:
                # The transaction is rolled back, and with it all that was stored of this job.
                raise JobExists(twin.id, twin.state)
        _refuse_full_queue(connection, prepared, len(rows.costs))
        _store_chunks(connection, job_id, rows, now if prepared.mode == "embedded" else None)
        all_invalid = len(rows.invalid) == len(rows.costs)
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id)
            .values(
                rows=len(rows.costs),
                effective_rows=rows.effective,
                key_sha256=key,
                skipped=len(rows.invalid),
                context_tokens=gauge.context_needed if gauge else None,
                state=(JobState.FAILED if all_invalid else JobState.QUEUED).value,
                stop_reason="every row failed" if all_invalid else None,
                finished_at=now if all_invalid else None,
            )
        )
    _refresh_statistics(db)
    return job_id


def _at(end: str | Moment | None, now: float) -> float | None:
    return end.by(now) if isinstance(end, Moment) else None


@contextlib.contextmanager
def _ready(rows: Rows, prepared: Prepared) -> Iterator[Iterator[PreparedRow]]:
    """The rows of a job with templates for the queue, prepared before a transaction begins: a slow template would hold
    the lock of a SQLite file, for which workers wait. They lie in a file, so that memory stays flat.
    """
    made = iter(rows)
    if prepared.task is None or prepared.mode != "queue":
        yield made
        return
    with tempfile.TemporaryFile(prefix="promptmill-") as file:
        while batch := list(islice(made, BATCH_ROWS)):
            pickle.dump(batch, file, pickle.HIGHEST_PROTOCOL)
        end = file.tell()
        file.seek(0)
        yield (row for batch in iter(lambda: pickle.load(file) if file.tell() < end else None, None) for row in batch)


def _refresh_statistics(db: Engine) -> None:
    """In a transaction of its own: others wait for the locks of the submission, and the job is stored without it."""
    if db.dialect.name != "postgresql":
        return
    with contextlib.suppress(SQLAlchemyError, DatabaseError), writing(db) as connection:
        refresh_statistics(connection, requests, chunks)


def _key(prepared: Prepared) -> str:
    """SHA-256 over what the job asks: dataset, model, task and parameters; not how urgent it is, or where it runs."""
    options, task = prepared.options, prepared.task
    asked = {
        "dataset": prepared.dataset.sha256, "format": prepared.dataset.format, "model": prepared.model,
        "fingerprint": prepared.fingerprint, "task": task.sha256 if task else None,
        "system": prepared.system, "sampling": prepared.sampling, "selection": options.selection.to_json(),
        "skip_invalid": options.skip_invalid,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _twin(db: Connection, key: str) -> sa.Row[Any, Any] | None:
    """The youngest job with the key that completed or still may."""
    useless = (JobState.FAILED.value, JobState.CANCELLED.value, JobState.EXPIRED.value)
    return db.execute(
        sa.select(jobs.c.id, jobs.c.state)
        .where(jobs.c.key_sha256 == key, jobs.c.state.not_in(useless))
        .order_by(jobs.c.id.desc())
        .limit(1)
    ).one_or_none()


def _refuse_full_queue(db: Connection, prepared: Prepared, rows: int) -> None:
    mode, limit, key_limit = prepared.mode, prepared.queue_limit, prepared.key_limit
    if mode != "queue" or (limit is None and key_limit is None):
        return
    # Who submits at the same time is counted too.
    lock_name(db, "queue limit")
    if limit is not None and (waiting := waiting_requests(db, mode)) + rows > limit:
        raise QueueFull(
            f"the queue is full: {waiting:,} requests wait, and {rows:,} more would exceed {limit:,}",
            hint="Wait, cancel a job, or raise JOBS_MAX_QUEUED_REQUESTS.",
        )
    if key_limit is not None and (waiting := waiting_requests(db, mode, prepared.api_key_id)) + rows > key_limit:
        raise QueueFull(
            f"this key has {waiting:,} requests waiting, and {rows:,} more would exceed its {key_limit:,}",
            hint="Wait for them, or cancel some.",
        )


def job_columns(prepared: Prepared) -> dict[str, Any]:
    """What a new job's row says of what was asked."""
    options, dataset, task = prepared.options, prepared.dataset, prepared.task
    selection = options.selection.to_json()
    return {
        "name": options.name, "state": JobState.QUEUED.value, "mode": prepared.mode,
        "dataset_name": dataset.name, "dataset_sha256": dataset.sha256, "dataset_format": dataset.format,
        "model": prepared.model, "model_fingerprint": prepared.fingerprint,
        "task_name": task.name if task else None, "task_text": task.text if task else None,
        "task_folder": task.folder if task else None,
        "task_sha256": task.sha256 if task else None, "system_prompt": prepared.system,
        "sampling": json.dumps(prepared.sampling, ensure_ascii=False),
        "priority": options.priority, "rows": 0, "slots": prepared.slots, "max_errors": options.max_errors,
        "store": options.store, "env": json.dumps(_environment()),
        "time_limit_s": span_s(options.time_limit, "time_limit"), "use_cache": options.use_cache,
        "api_key_id": prepared.api_key_id,
        "selection": json.dumps(selection, ensure_ascii=False) if selection else None,
    }  # fmt: skip


def _environment() -> dict[str, str]:
    """Where the job was submitted: enough to explain a difference between two jobs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return {
        "promptmill": version("promptmill"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": user,
    }


def _store_requests(db: Connection, job_id: str, rows: Iterator[PreparedRow], now: float, invalid: Counts) -> None:
    stored = 0
    while batch := list(islice(rows, BATCH_ROWS)):
        values = [
            (
                job_id, stored + index, row.custom_id, row.input, row.expected, row.meta, row.sampling,
                row.input_digest, row.prompt_digest,
            )
            for index, row in enumerate(batch)
        ]  # fmt: skip
        copy_rows(db, requests, REQUEST_COLUMNS, values)
        failed = [(stored + index, row.error) for index, row in enumerate(batch) if row.error]
        copy_rows(db, results, RESULT_COLUMNS, [_invalid_result(job_id, row, *error, now) for row, error in failed])
        invalid.results([Failed(row, *error) for row, error in failed], enqueued_at=None)
        stored += len(batch)


def _invalid_result(job_id: str, row: int, error_class: ErrorClass, problem: str, now: float) -> tuple[Any, ...]:
    outcome: dict[str, Any] = {
        "job_id": job_id, "row": row, "state": "error", "error_class": error_class.value, "error_message": problem,
        "committed_at": now, "attempt": 0, "deduplicated": False,
    }  # fmt: skip
    return tuple(outcome.get(name) for name in RESULT_COLUMNS)


def _store_chunks(db: Connection, job_id: str, rows: Rows, published_at: float | None) -> None:
    invalid, values, seen = rows.invalid, [], 0
    for number, span in enumerate(plan_chunks(rows.costs)):
        errors = 0
        while seen < len(invalid) and invalid[seen] < span.stop:
            errors, seen = errors + 1, seen + 1
        state = ChunkState.DONE if errors == len(span) else ChunkState.QUEUED
        values.append((job_id, number, span.start, len(span), state.value, 0, published_at, 0, errors, 0))
    copy_rows(db, chunks, CHUNK_COLUMNS, values)


def plan_chunks(costs: Sequence[int]) -> Iterator[range]:
    """Runs of consecutive rows: at most CHUNK_TOKENS of summed cost each, small at both ends of the job.

    ``costs``: expected tokens of each row. Every row is in exactly one run; a row above the budget travels alone.
    """
    total = len(costs)
    start = spent = 0
    most = _most_rows(0, total)
    for row, cost in enumerate(costs):
        if row > start and (spent + cost > CHUNK_TOKENS or row - start >= most):
            yield range(start, row)
            start, spent = row, 0
            most = _most_rows(start, total)
        spent += cost
    if start < total:
        yield range(start, total)


def _most_rows(start: int, total: int) -> int:
    """Rows that a chunk starting here may have: it doubles from the first ones on, and shrinks with what is left."""
    growing = FIRST_CHUNK_ROWS if start < 2 * FIRST_CHUNK_ROWS else CHUNK_ROWS
    left = max(LAST_CHUNK_ROWS, (total - start) // TAPER)
    return min(growing, left, CHUNK_ROWS)
